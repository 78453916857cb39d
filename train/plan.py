"""A training job with what the files that it names say."""

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from h1bjax.calibrate import Calibration
from h1bjax.calibration_file import find_calibration, is_calibratable, needs_calibration
from h1bjax.checkpoint import load_parameters, resolve_model
from h1bjax.config import LlamaConfig
from h1bjax.fingerprint import file_sha256, weights_fingerprint
from h1bjax.model import random_projections
from h1bjax.sharding import parameter_sharding
from h1bjax.tokenizer import Tokenizer
from train.initialise import random_parameters
from train.options import Job
from train.placement import Placement
from train.student import Origin, codec_arrays


@dataclass(frozen=True)
class Plan:
    """A job with what its files say.

    Attributes:
        job: the options.
        config: the model's.
        source: the folder that holds the tokenizer and, unless weights are random, the weights.
        teacher: the folder of the teacher's weights; None for the model before training.
        tokenizer: the model's.
        end: the token that ends a document.
        context: tokens of a sequence.
        calibration: of the cache that the model is trained to read.
        placement: where arrays go.
    """

    job: Job
    config: LlamaConfig
    source: Path
    teacher: Path | None
    tokenizer: Tokenizer
    end: int
    context: int
    calibration: Calibration
    placement: Placement

    @classmethod
    def create(cls, job: Job) -> Self:
        """Reads what a job names, but for the text and the weights.

        Raises:
            FileNotFoundError: files or folders are missing.
            ValueError: a file is invalid, or they do not fit each other or the options.
        """
        missing = [str(file) for file in (*job.text, *job.valid) if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"No such file: {', '.join(missing)}")
        if job.model is not None:
            source = resolve_model(job.model)
            config = LlamaConfig.from_hf(source)
        else:
            assert job.init is not None and job.tokenizer is not None
            source, config = job.tokenizer, LlamaConfig.from_hf(job.init)
        tokenizer = Tokenizer.from_pretrained(source)
        # A model of others may name tokens that it never reads; what it reads is checked later.
        if job.model is None and tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer in {source} has {tokenizer.vocab_size} tokens, more than the "
                f"model's vocabulary of {config.vocab_size}"
            )
        context = config.max_position_embeddings if job.context is None else job.context
        longest = min(config.max_position_embeddings, config.sliding_window or math.inf)
        if context > longest:
            raise ValueError(f"context={context} exceeds the {longest} tokens of the model")
        _check_cache(job, config, context)
        end, calibration = _end(config, tokenizer, source), _calibration(job, config, source)
        placement = Placement.create(config, job.mesh, job.batch // job.microbatches)
        teacher = None if job.teacher is None else _teacher(job.teacher, config, source)
        return cls(job, config, source, teacher, tokenizer, end, context, calibration, placement)

    def settings(self) -> dict[str, Any]:
        """What makes the job what it is: two jobs with the same settings are the same job.

        Raises:
            FileNotFoundError: there are no weights.
            ValueError: the weights are not readable safetensors.
        """
        begin = "random weights" if self.job.model is None else weights_fingerprint(self.source)
        return {
            "config": self.config.to_hf(),
            "begin": begin,
            "teacher": None if self.teacher is None else weights_fingerprint(self.teacher),
            "calibration": _digest(self.calibration),
            "tokenizer": file_sha256(self.source / "tokenizer.json"),
            "text": [file_sha256(file) for file in self.job.text],
            "batch": self.job.batch,
            "context": self.context,
            "seed": self.job.seed,
            **asdict(self.job.recipe),
        }

    def origin(self) -> Origin:
        """The model to begin from."""
        if self.job.model is None:
            weights = random_parameters(self.config, jax.random.key(self.job.seed))
        else:
            weights = self._load(self.source)
        return Origin(weights, self.calibration.codec, self.calibration.rotation)

    def teacher_weights(self, origin: Origin) -> Mapping[str, Array]:
        """Those of the model that is imitated."""
        return origin.weights if self.teacher is None else self._load(self.teacher)

    def _load(self, folder: Path) -> dict[str, Array]:
        mesh = self.placement.mesh
        rule = None if mesh is None else parameter_sharding(mesh, self.config)
        return load_parameters(folder, self.config, jnp.float32, rule)


def _teacher(path_or_id: str, config: LlamaConfig, source: Path) -> Path:
    """The folder of a teacher that suits the model in `source`."""
    folder = resolve_model(path_or_id)
    ours, theirs = asdict(config), asdict(LlamaConfig.from_hf(folder))
    # What it was saved in does not matter, nor where its own texts begin and end.
    unlike = [
        f"{name} {theirs[name]} instead of {ours[name]}"
        for name in ours
        if theirs[name] != ours[name] and name not in ("dtype", "bos_token_id", "eos_token_ids")
    ]
    if unlike:
        raise ValueError(
            f"the teacher {path_or_id} is not of the model's shape: {', '.join(unlike)}"
        )
    if file_sha256(folder / "tokenizer.json") != file_sha256(source / "tokenizer.json"):
        raise ValueError(f"the teacher {path_or_id} has another tokenizer than the model")
    return folder


def _check_cache(job: Job, config: LlamaConfig, context: int) -> None:
    spec = job.scope.spec
    spec.check_head_dim(config.head_dim)
    if not spec.exact and context <= spec.exact_tokens:
        raise ValueError(
            f"context={context} lies within the {spec.exact_tokens} tokens that the cache "
            f"{spec.name!r} keeps exactly; train with a longer one"
        )


def _calibration(job: Job, config: LlamaConfig, source: Path) -> Calibration:
    """That beside the weights, or the random projections that loading the model would use."""
    spec = job.scope.spec
    found = find_calibration(source, spec) if is_calibratable(spec) else None
    if found is not None:
        return found
    if needs_calibration(spec):
        raise ValueError(
            f"the cache {spec.name!r} needs a calibration before it can be trained; make one with: "
            f"h1bjax calibrate --model {shlex.quote(str(job.model))} --text FILE --cache "
            f"{spec.name} --out DIR, and train the model in DIR"
        )
    return Calibration(spec, *random_projections(config, spec, seed=0))


def _digest(calibration: Calibration) -> str:
    """What tells calibrations apart."""
    digest = hashlib.sha256()
    arrays = codec_arrays(calibration.codec)
    if calibration.rotation is not None:
        arrays["rotation"] = calibration.rotation
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.asarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _end(config: LlamaConfig, tokenizer: Tokenizer, source: Path) -> int:
    """The token that ends a document."""
    ours = tokenizer.eos_token_id
    if ours is None and not config.eos_token_ids:
        raise ValueError(
            f"neither the tokenizer in {source} nor the model's configuration names a token that "
            "ends a text; add eos_token to tokenizer_config.json or eos_token_id to config.json"
        )
    if ours is None:
        return config.eos_token_ids[0]
    if config.eos_token_ids and ours not in config.eos_token_ids:
        raise ValueError(
            f"the tokenizer in {source} ends a text with the token {ours}, and the model's "
            f"configuration with {list(config.eos_token_ids)}; make eos_token_id the same"
        )
    return ours
