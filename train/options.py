"""The options of a training job."""

import math
from dataclasses import dataclass
from pathlib import Path

from train.step import Recipe

RATE_FROM_RANDOM = 1e-3
RATE_FROM_MODEL = 1e-4


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
        batch: sequences in a step.
        context: tokens of a sequence; None takes the longest that the model is made for.
        microbatches: parts that a batch is computed in, one after the other.
        learning_rate: its peak; None is 1e-3 from random weights and 1e-4 from a model's.
        warmup: steps in which it rises; None is one in twenty.
        weight_decay: of matrices.
        dtype: of the arithmetic.
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
    batch: int = 32
    context: int | None = None
    microbatches: int = 1
    learning_rate: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    dtype: str = "bfloat16"
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
        rate, decay = self.learning_rate, self.weight_decay
        if rate is not None and not 0 < rate < math.inf:
            problems.append(f"learning_rate={rate} must be positive")
        if not 0 <= decay < math.inf:
            problems.append(f"weight_decay={decay} must not be negative")
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
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def recipe(self) -> Recipe:
        """How parameters are updated."""
        rate = RATE_FROM_RANDOM if self.model is None else RATE_FROM_MODEL
        return Recipe(
            steps=self.steps,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            warmup=self.steps // 20 if self.warmup is None else self.warmup,
            weight_decay=self.weight_decay,
            microbatches=self.microbatches,
            dtype=self.dtype,
        )
