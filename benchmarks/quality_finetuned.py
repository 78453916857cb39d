r"""The quality study after training: what each cache still loses when the model learnt to read it.

    python benchmarks/quality_finetuned.py --model DIR --text train.jsonl.xz retrieval.jsonl.xz \
        --calibration-text calibration.jsonl.xz --books valid.jsonl.xz --wikitext wikitext.txt \
        --out finetuned.json

trains one model for every preset: with exact attention first, the control, and then for each
compressed cache, from the same weights on the same text in the same order for as many steps. A
model that learns a cache also imitates a teacher with exact attention, the control unless
`--teacher before`. All of their parameters train. Then each is scored as in `quality.py`, of whose
results

    python benchmarks/quality_finetuned.py --merge docs/quality.json finetuned.json

makes this a part, which `quality.py --table` and `quality_plot.py` show.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from jaxtyping import Array
from quality_results import EXACT, merge_finetuned
from quality_tasks import Tasks, describe, write_results

from h1bjax import CacheSpec, Decoder, LlamaConfig, load
from h1bjax.calibrate import Calibration, calibrate, calibration_windows
from h1bjax.calibration_file import is_calibratable
from h1bjax.checkpoint import load_parameters, resolve_model
from h1bjax.decoder import fold_value_rotation
from h1bjax.model import Model
from h1bjax.text_files import read_documents
from train.data import PackedText, pack
from train.step import Recipe, TrainState, initial_state, train_step
from train.student import (
    Origin,
    Scope,
    fixed_arrays,
    merged_codec,
    merged_weights,
    trained_arrays,
)

FILES = ("model", "text", "calibration_text", "books", "wikitext", "out")

PRESETS = ("h1b", "h1b-256-v2", "h1b-v2", "h1b-paper", "h1b-p32-v2")

LAST = 0.1
"""The losses that a run reports are means over this part of its steps, the last."""


@dataclass(frozen=True)
class Subject:
    """A cache that a model is trained to read.

    Attributes:
        config: the model's.
        recipe: how it is trained; its scope says for which cache.
        calibration: with which training begins.
    """

    config: LlamaConfig
    recipe: Recipe
    calibration: Calibration

    @property
    def spec(self) -> CacheSpec:
        """The cache."""
        return self.recipe.scope.spec

    def trained(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """What training begins from; float32 weights are not copied."""
        return trained_arrays(
            self.config, self.recipe.scope, self._origin(weights), jax.random.key(0)
        )

    def fixed(self, weights: Mapping[str, Array], teacher: Mapping[str, Array]) -> dict[str, Array]:
        """What does not train, the teacher's weights among it."""
        recipe = self.recipe
        taught_by = teacher if recipe.distillation else None
        return fixed_arrays(recipe.scope, self._origin(weights), recipe.dtype, taught_by=taught_by)

    def compile(self, weights: Mapping[str, Array], batch: np.ndarray) -> Compiled:
        """The training step, compiled for the shapes of these arrays."""

        def shapes() -> tuple[TrainState, dict[str, Array]]:
            return initial_state(self.trained(weights), self.recipe), self.fixed(weights, weights)

        state, fixed = jax.eval_shape(shapes)
        return train_step.lower(state, fixed, batch, self.config, self.recipe).compile()

    def decoder(self, trained: Mapping[str, Array], fixed: Mapping[str, Array]) -> Decoder:
        """The model as it would be loaded from a checkpoint."""
        weights = merged_weights(self.config, self.recipe.scope, trained, fixed)
        weights = {name: array.astype(self.recipe.dtype) for name, array in weights.items()}
        rotation = self.calibration.rotation
        if rotation is not None:
            weights = fold_value_rotation(self.config, weights, rotation)
        return Decoder(self.config, weights, self.spec, merged_codec(trained, fixed))

    def _origin(self, weights: Mapping[str, Array]) -> Origin:
        return Origin(weights, self.calibration.codec, self.calibration.rotation)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, or merges an earlier one."""
    options = _parse(arguments)
    if options.merge is not None:
        whole, finetuned = options.merge
        results, found = (
            json.loads(path.read_text(encoding="utf-8")) for path in (whole, finetuned)
        )
        results["finetuned"] = merge_finetuned(results.get("finetuned"), found)
        write_results(whole, results)
        return
    study(options)


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the study and returns what it also writes to `options.out` after every preset.

    Raises:
        ValueError: an option or a file is not good, or results are there already.
        FileNotFoundError: a file is missing.
        FloatingPointError: a loss is not finite.
    """
    if options.out.exists():
        raise ValueError(f"{options.out} exists; the study overwrites nothing")
    names = [EXACT, *(name for name in dict.fromkeys(options.cache) if name != EXACT)]
    specs = [CacheSpec.preset(name) for name in names]
    held_out = {name: read_documents(getattr(options, name)) for name in ("books", "wikitext")}
    model = load(options.model, cache=EXACT, dtype=options.dtype)
    for spec in specs:
        spec.check_head_dim(model.config.head_dim)
    tasks = Tasks.create(
        model,
        **held_out,
        books_tokens=options.books_tokens,
        wikitext_tokens=options.wikitext_tokens,
        retrieval_windows=options.retrieval_windows,
        context=options.context,
        batch=options.score_batch,
    )
    text = _text(model, options)
    subjects = _subjects(model, specs, options)
    weights = load_parameters(resolve_model(options.model), model.config, jnp.float32)
    results: dict[str, Any] = {
        "settings": {
            name: [str(file) for file in value] if isinstance(value, list) else str(value)
            for name, value in vars(options).items()
            if name in FILES
        }
        | {name: value for name, value in vars(options).items() if name not in (*FILES, "merge")},
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        | {"python": platform.python_version()},
        "tokens": len(text.stream),
        "presets": [],
    }
    first = text.batch(options.seed, 0, options.batch)
    # Compiling takes longer than training, and one core for each program.
    with ThreadPoolExecutor(options.compilers) as pool:
        steps = [pool.submit(subject.compile, weights, first) for subject in subjects]
        scores = [
            pool.submit(
                tasks.compile,
                subject.decoder(subject.trained(weights), subject.fixed(weights, weights)),
            )
            for subject in subjects
        ]
    for ready in scores:
        ready.result()
    teacher = weights
    for subject, step in zip(subjects, [step.result() for step in steps], strict=True):
        fixed = subject.fixed(weights, teacher)
        trained, training = _train(subject, step, weights, fixed, text, options)
        begin = time.perf_counter()
        found = tasks.score(subject.decoder(trained, fixed))
        run = {
            "calibration_seed": options.seed if is_calibratable(subject.spec) else None,
            "scores": found,
            "seconds": round(time.perf_counter() - begin, 2),
            "training": training,
        }
        described = describe(model.config, subject.spec, options.context)
        results["presets"].append(described | {"runs": [run]})
        write_results(options.out, results)
        print(
            f"{subject.spec.name}: books {found['books']['bits_per_byte']:.4f}, copy "
            f"{found['copy']['bits_per_byte']:.4f} bits per byte, {training}",
            file=sys.stderr,
            flush=True,
        )
        if subject.spec.exact and options.teacher == "control":
            teacher = trained
    return results


def _text(model: Model, options: argparse.Namespace) -> PackedText:
    """The text to train on."""
    tokenizer = model.tokenizer
    # Whoever scores with it has checked that there is one.
    assert tokenizer is not None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {options.model} names no token that ends a text")
    begin = time.perf_counter()
    stream = pack(
        read_documents(options.text),
        tokenizer,
        vocab_size=model.config.vocab_size,
        end=tokenizer.eos_token_id,
    )
    seconds = time.perf_counter() - begin
    print(f"read {len(stream)} tokens to train on: {seconds:.1f} s", file=sys.stderr, flush=True)
    return PackedText(stream, options.context)


def _subjects(
    model: Model, specs: Sequence[CacheSpec], options: argparse.Namespace
) -> list[Subject]:
    """What is trained, with a new calibration each."""
    assert model.tokenizer is not None
    begin = time.perf_counter()
    wanted = [spec for spec in specs if is_calibratable(spec)]
    windows = calibration_windows(
        model.tokenizer,
        read_documents(options.calibration_text),
        context=options.context,
        tokens=options.calibration_tokens,
        seed=options.seed,
    )
    made = calibrate(model.decoder, windows, wanted, seed=options.seed) if wanted else []
    by_spec = dict(zip(wanted, made, strict=True))
    seconds = time.perf_counter() - begin
    print(f"calibrated {len(wanted)} presets: {seconds:.1f} s", file=sys.stderr, flush=True)
    return [
        Subject(
            model.config,
            Recipe(
                steps=options.steps,
                learning_rate=options.learning_rate,
                warmup=options.steps // 20,
                weight_decay=0.1,
                distillation=0.0 if spec.exact else options.distillation,
                dtype=options.dtype,
                scope=Scope(spec),
            ),
            by_spec.get(spec, Calibration(spec, None, None)),
        )
        for spec in specs
    ]


def _train(
    subject: Subject,
    step: Compiled,
    weights: Mapping[str, Array],
    fixed: Mapping[str, Array],
    text: PackedText,
    options: argparse.Namespace,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """What has trained after all steps, and what that took and came to."""
    # Copies, because the first step consumes its state.
    origin = {name: jnp.array(array) for name, array in weights.items()}
    state = initial_state(subject.trained(origin), subject.recipe)
    metrics = []
    begin = time.perf_counter()
    for index in range(options.steps):
        state, found = step(state, fixed, text.batch(options.seed, index, options.batch))
        metrics.append(found)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begin
    losses = [jax.device_get(found.losses) for found in metrics]
    nats = [float(loss.next_token) for loss in losses]
    if not np.isfinite(nats).all():
        raise FloatingPointError(f"a loss with the cache {subject.spec.name!r} is not finite")
    last = -max(1, int(LAST * options.steps))
    memory = step.memory_analysis()
    assert memory is not None
    # The state is updated in place.
    nbytes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    nbytes += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return state.parameters, {
        "seconds": round(seconds, 2),
        "tokens_per_second": options.steps * options.batch * options.context / seconds,
        "nbytes": nbytes,
        "nats_per_token": statistics.fmean(nats[last:]),
        "divergence": statistics.fmean(float(loss.divergence) for loss in losses[last:])
        if subject.recipe.distillation
        else None,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a folder, or a hub id")
    for name, help in {
        "text": "text to train on, .txt or .jsonl, also compressed",
        "calibration-text": "text to calibrate with",
        "books": "held-out text, from which the passages to copy are taken too",
        "wikitext": "held-out text of another kind",
    }.items():
        parser.add_argument(f"--{name}", nargs="+", metavar="FILE", help=help)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument(
        "--cache",
        nargs="+",
        default=list(PRESETS),
        metavar="PRESET",
        help=f"which presets, besides exact; default: {' '.join(PRESETS)}",
    )
    parser.add_argument(
        "--teacher",
        choices=("control", "before"),
        default="control",
        help="with exact attention: the model that trained on the same text, or as it was before; "
        "default: %(default)s",
    )
    for name, default in {"learning-rate": 1.5e-4, "distillation": 1.0}.items():
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="X", help="default: %(default)s"
        )
    for name, default in {
        "steps": 400,
        "batch": 16,
        "context": 2048,
        "calibration-tokens": 262144,
        "books-tokens": 131072,
        "wikitext-tokens": 131072,
        "retrieval-windows": 32,
        "score-batch": 32,
        "compilers": 4,
        "seed": 0,
    }.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s"
        )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--merge",
        nargs=2,
        type=Path,
        metavar=("ALL", "FINETUNED"),
        help="only make the results of this study a part of those of quality.py",
    )
    options = parser.parse_args(arguments)
    missing = [name for name in FILES if getattr(options, name) is None]
    if options.merge is None and missing:
        parser.error("give " + ", ".join(f"--{name.replace('_', '-')}" for name in missing))
    return options


if __name__ == "__main__":
    main()
