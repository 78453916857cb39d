"""What a training step costs: `python -m train.bench --config CONFIG --cache exact h1b h1b-p32`.

Weights and tokens are random, which changes no time. Every cache is timed with and without a
teacher; `ratio` is to the plain model without one. Where keys have no codec, and so no
temperatures or decoders, everything trains in their place.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int32

from h1bjax.cache import CacheSpec, choose_training
from h1bjax.cli.options import positive
from h1bjax.config import LlamaConfig
from h1bjax.model import random_projections
from train.initialise import random_parameters
from train.options import RANK
from train.step import Recipe, initial_state, train_step
from train.student import OF_CODEC, TRAINED, Origin, Scope, Trained, fixed_arrays, trained_arrays

TIMED = 10
"""Steps in a row that are timed together, so that the host is seldom waited for."""


def seconds_per_step(
    config: LlamaConfig,
    recipe: Recipe,
    windows: Int32[np.ndarray, "batch context_and_one"],
    repeats: int,
) -> float:
    """The median over some groups of steps, of which the first is left out."""
    spec = recipe.scope.spec
    key = jax.random.key(0)
    codec, rotation = random_projections(config, spec, seed=0)
    origin = Origin(random_parameters(config, key), codec, rotation)
    taught_by = origin.weights if recipe.distillation else None
    fixed = fixed_arrays(recipe.scope, origin, recipe.dtype, taught_by=taught_by)
    state = initial_state(trained_arrays(config, recipe.scope, origin, key), recipe)
    del origin, taught_by
    seconds = []
    for _ in range(repeats + 1):
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for _ in range(TIMED):
            state, metrics = train_step(state, fixed, windows, config, recipe)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - begin) / TIMED)
        if not np.isfinite(float(metrics.losses.next_token)):
            raise FloatingPointError(f"the loss with the cache {spec.name!r} is not finite")
    return statistics.median(seconds[1:])


def scope_of(spec: CacheSpec, trained: Trained) -> Scope:
    """What trains for a cache: everything in place of what its keys have not."""
    if spec.sketch is None and trained in OF_CODEC:
        return Scope(spec)
    return Scope(spec, trained, RANK if trained == "lora" else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each cache, with and without a teacher."""
    parser = argparse.ArgumentParser(
        prog="python -m train.bench", description="Time steps of training."
    )
    parser.add_argument("--config", type=Path, required=True, help="a config.json")
    parser.add_argument("--cache", nargs="+", default=["exact", "h1b"], metavar="PRESET")
    parser.add_argument("--train", choices=TRAINED, default="everything")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--context", type=positive, default=2048)
    parser.add_argument("--microbatches", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-remat", dest="remat", action="store_false")
    options = parser.parse_args(arguments)
    config = LlamaConfig.from_hf(options.config)
    windows = np.random.default_rng(0).integers(
        0, config.vocab_size, (options.batch, options.context + 1), np.int32
    )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(options)}")
    plain = None
    for name in dict.fromkeys(["exact", *options.cache]):
        spec = CacheSpec.preset(name)
        choice = choose_training(spec, options.dtype, config.head_dim)
        for distillation in (0.0, 1.0):
            recipe = Recipe(
                steps=1000,
                learning_rate=1e-5,
                warmup=100,
                weight_decay=0.1,
                distillation=distillation,
                microbatches=options.microbatches,
                dtype=options.dtype,
                remat=options.remat,
                scope=scope_of(spec, options.train),
            )
            seconds = seconds_per_step(config, recipe, windows, options.repeats)
            plain = plain or seconds
            taught = "taught" if distillation else "untaught"
            speed = windows[:, 1:].size / seconds
            print(
                f"{name:20} {taught:9} {1e3 * seconds:9.2f} ms  {speed:10.0f} tokens/s  "
                f"ratio {seconds / plain:.3f}  ({choice.implementation}: {choice.reason})",
                flush=True,
            )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
