"""The options of a training job."""

import math
from dataclasses import dataclass
from pathlib import Path

from h1bjax.cache import CacheSpec
from train.step import Recipe
from train.student import OF_CODEC, Scope, Trained

RATE_FROM_RANDOM = 1e-3
RATE_FROM_MODEL = 1e-4
RATE_OF_LORA = 1e-3

CODEC_RATE = 3e-3
RATE_OF_TEMPERATURES = 3e-2

RANK = 16
"""Of the changes that "lora" trains, unless another is given."""


@dataclass(frozen=True)
class Job:
    """The options of a training job.

    Attributes:
        text: files for `read_documents` to train on.
        out: the job's folder. If it holds the same job, that is continued.
        steps: optimizer steps.
        init: a config.json to begin from random weights; then `tokenizer` is its tokenizer's
            folder.
        tokenizer: see `init`.
        model: a model's folder or hub id, to begin from its weights with its tokenizer.
        cache: the preset that the model is trained to read, calibrated beside its weights if it
            needs that; None trains the plain model.
        trained: what trains, see `Scope`.
        rank: of the changes that "lora" trains; None is 16 there.
        next_token: how much the loss on the next token counts.
        distillation: how much the divergence from the teacher counts; None is 1 with a
            `teacher` or a cache other than the exact one, and otherwise 0.
        teacher: the folder or hub id of a model of the same shape and tokenizer, to be imitated
            with exact attention; None is the model before training.
        batch: sequences in a step.
        context: tokens of a sequence; None takes the longest that the model is made for.
        microbatches: parts that a batch is computed in, one after the other.
        learning_rate: its peak, for what trains weights; None is 1e-3 from random weights and for
            "lora", and otherwise 1e-4 from a model's.
        codec_rate: that of the key codec, for a cache that has one, as a fraction of the size of
            its arrays; None is 0.03 for "temperatures" and otherwise 0.003.
        warmup: steps in which it rises; None is one in twenty.
        weight_decay: of matrices.
        dtype: of the arithmetic.
        remat: whether the backward pass computes again what is cheap, to need less memory.
        mesh: devices along the axes of a mesh, see `h1bjax.sharding.make_mesh`; None for one.
        seed: of random weights and of the order of the text.
        checkpoint_every: steps between checkpoints.
        valid: files for `read_documents` to evaluate the trained model on.
    """

    text: tuple[Path, ...]
    out: Path
    steps: int
    init: Path | None = None
    tokenizer: Path | None = None
    model: str | None = None
    cache: str | None = None
    trained: Trained = "everything"
    rank: int | None = None
    next_token: float = 1.0
    distillation: float | None = None
    teacher: str | None = None
    batch: int = 32
    context: int | None = None
    microbatches: int = 1
    learning_rate: float | None = None
    codec_rate: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    dtype: str = "bfloat16"
    remat: bool = True
    mesh: str | None = None
    seed: int = 0
    checkpoint_every: int = 500
    valid: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be at least {least}"
            for name, value, least in (
                ("steps", self.steps, 1),
                ("batch", self.batch, 1),
                ("context", self.context, 1),
                ("microbatches", self.microbatches, 1),
                ("warmup", self.warmup, 0),
                ("seed", self.seed, 0),
                ("checkpoint_every", self.checkpoint_every, 1),
            )
            if value is not None and value < least
        ]
        for name, rate in (("learning_rate", self.learning_rate), ("codec_rate", self.codec_rate)):
            if rate is not None and not 0 < rate < math.inf:
                problems.append(f"{name}={rate} must be positive")
        for name, weight in (
            ("weight_decay", self.weight_decay),
            ("next_token", self.next_token),
            ("distillation", self.distillation),
        ):
            if weight is not None and not 0 <= weight < math.inf:
                problems.append(f"{name}={weight} must not be negative")
        if self.next_token == 0 and self._distillation == 0:
            problems.append("next_token and distillation must not both be 0")
        if self.microbatches >= 1 and self.batch % self.microbatches:
            problems.append(f"batch={self.batch} must be a multiple of {self.microbatches} parts")
        if self.warmup is not None and self.warmup > self.steps:
            problems.append(f"warmup={self.warmup} exceeds the {self.steps} steps")
        if self.dtype not in ("bfloat16", "float32"):
            problems.append(f"dtype={self.dtype!r} must be bfloat16 or float32")
        if (self.init is None) == (self.model is None):
            problems.append("give either a config.json for random weights or a model")
        if (self.init is None) != (self.tokenizer is None):
            problems.append("a tokenizer belongs to random weights, and to them alone")
        if self.model is None and (self.cache is not None or self.trained != "everything"):
            problems.append("random weights train as a whole, and without a cache")
        if self.model is None and self.distillation:
            problems.append("random weights have nothing to teach")
        if self.teacher is not None and (self.model is None or self._distillation == 0):
            problems.append(
                "a teacher belongs to a model that begins from weights, and teaches by "
                "a distillation above 0"
            )
        if self.cache is None and self.trained in OF_CODEC:
            problems.append(f"{self.trained} belong to a cache; name one")
        try:
            problems += self._idle_rates(self.scope)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def scope(self) -> Scope:
        """What trains, for which cache."""
        rank = RANK if self.trained == "lora" and self.rank is None else self.rank
        return Scope(CacheSpec.preset(self.cache or "exact"), self.trained, rank)

    @property
    def recipe(self) -> Recipe:
        """How parameters are updated."""
        scope = self.scope
        rate = RATE_OF_LORA if self.trained == "lora" else RATE_FROM_MODEL
        if self.model is None:
            rate = RATE_FROM_RANDOM
        return Recipe(
            steps=self.steps,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            warmup=self.steps // 20 if self.warmup is None else self.warmup,
            codec_rate=self._codec_rate,
            weight_decay=self.weight_decay,
            next_token=self.next_token,
            distillation=self._distillation,
            microbatches=self.microbatches,
            dtype=self.dtype,
            remat=self.remat,
            scope=scope,
        )

    def _idle_rates(self, scope: Scope) -> list[str]:
        """What is wrong with rates that would change nothing."""
        problems = []
        if self.learning_rate is not None and not scope.trains_weights:
            problems.append(
                f"learning_rate={self.learning_rate} is that of weights, and with "
                f"trained={self.trained!r} none train; set codec_rate instead"
            )
        if self.codec_rate is not None and not scope.codec_names:
            problems.append(
                f"codec_rate={self.codec_rate} is that of a key codec, and the cache "
                f"{scope.spec.name!r} has none"
            )
        return problems

    @property
    def _distillation(self) -> float:
        if self.distillation is not None:
            return self.distillation
        return 0.0 if self.cache in (None, "exact") and self.teacher is None else 1.0

    @property
    def _codec_rate(self) -> float:
        if self.codec_rate is not None:
            return self.codec_rate
        return RATE_OF_TEMPERATURES if self.trained == "temperatures" else CODEC_RATE
