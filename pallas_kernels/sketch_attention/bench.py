r"""The speed of sketch attention, beside bf16 attention and a plain copy in the same run.

    python -m pallas_kernels.sketch_attention.bench --preset h1b h1b-256-v2

prints a Markdown table with one line for each shape, preset and implementation:

- **µs**: of one call, gaps between kernels included, as the slope between a loop of one chain of 16
  calls and a loop of five; in brackets the quartiles over repetitions. Calls rotate over as many
  layers as the caches of the device cannot hold, each with a query of its own. The transforms of
  all layers are prepared beforehand, as a model prepares its own once for all layers of a step.
  **kernels**: the part of it in which a kernel ran, by CUPTI.
- **GB/s**: over the bytes that attention cannot do without: the packed keys and values, with their
  scalars, that rows see. Queries, transforms, outputs and scratch are not counted.
- **of copy**: the same as a share of the bandwidth of copying 1 GiB, counting bytes read and
  written.
- **× bf16**: how many times faster than cuDNN's bf16 attention (XLA's where there is no GPU).
- **error**: the Euclidean distance from attention to the same codes in float64, relative to it;
  the larger of two (row, head) outputs.

With --json it prints lines of JSON: first the device, then one object for each line of the table.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.sketch_attention.api import sketch_attention
from pallas_kernels.sketch_attention.bench_cases import (
    PRESETS,
    SHAPES,
    Inputs,
    Preset,
    Shape,
    exact_answer,
    random_inputs,
    stops,
)
from pallas_kernels.sketch_attention.choice import Choice, Implementation, choose
from pallas_kernels.sketch_attention.timing import (
    CALLS,
    Seconds,
    Step,
    copy_bandwidth,
    ordered,
    steady_time,
)

AUTO = "auto"
BF16 = "bf16"

_PACKAGES = ("jax", "jaxlib", "triton", "jax-triton")

_UNCACHEABLE = 200e6
"""Bytes that no cache of a device holds: the H100's is 50 MB."""

_COLUMNS = ("shape", "preset", "runs as", "µs", "kernels", "GB/s", "of copy", "× bf16", "error")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        shape: (batch, KV heads, groups, tokens, head dimension).
        ragged: whether rows see between half of the tokens and all, rather than all.
        preset: how keys and values are stored; "bf16" is the peer.
        implementation: what ran, or what was asked for and could not.
        reason: why that one, or why not.
        nbytes: that a call has to read.
        seconds: of one call; None where nothing ran.
        bandwidth: bytes per second.
        share: of the copy's bandwidth.
        speedup: over the peer; None without a peer.
        error: relative, against float64; None where it was not compared.
    """

    shape: tuple[int, ...]
    ragged: bool
    preset: str
    implementation: str
    reason: str
    nbytes: int
    seconds: Seconds | None = None
    bandwidth: float | None = None
    share: float | None = None
    speedup: float | None = None
    error: float | None = None

    def timed(self, seconds: Seconds, copy: float, peer: Seconds | None) -> "Row":
        """The line with its time and what follows from it."""
        bandwidth = self.nbytes / seconds.median
        return replace(
            self,
            seconds=seconds,
            bandwidth=bandwidth,
            share=bandwidth / copy,
            speedup=None if peer is None else peer.median / seconds.median,
        )

    def report(self) -> dict[str, object]:
        """The line as JSON."""
        report: dict[str, object] = asdict(self)
        return report | {"seconds": None if self.seconds is None else self.seconds._asdict()}

    def cells(self) -> list[str]:
        """The line as cells of the table."""
        shape = ",".join(map(str, self.shape)) + (" ragged" if self.ragged else "")
        first = [shape, self.preset, self.implementation]
        if self.seconds is None or self.bandwidth is None or self.share is None:
            return [*first, self.reason, *[""] * (len(_COLUMNS) - 4)]
        median, low, high, kernels = (
            None if second is None else 1e6 * second for second in self.seconds
        )
        return [
            *first,
            f"{median:.1f} ({low:.1f} to {high:.1f})",
            "" if kernels is None else f"{kernels:.1f}",
            f"{self.bandwidth / 1e9:.0f}",
            f"{self.share:.1%}",
            "" if self.speedup is None else f"{self.speedup:.2f}",
            "" if self.error is None else f"{self.error:.1e}",
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for, and prints each result when it is there."""
    options = _parse(arguments)
    try:
        shapes = [Shape.parse(text) for text in options.shape]
    except ValueError as error:
        sys.exit(f"bench: error: {error}")
    copy = copy_bandwidth(repetitions=options.repetitions, nbytes=options.copy_bytes)
    _print_device(copy, options)
    for shape in shapes:
        for row in measure(
            shape,
            options.preset,
            [None if name == AUTO else name for name in options.implementation],
            copy,
            ragged=options.ragged,
            peer=not options.no_peer,
            repetitions=options.repetitions,
            seed=options.seed,
        ):
            print(json.dumps(row.report()) if options.json else _line(row.cells()), flush=True)


def measure(
    shape: Shape,
    presets: Sequence[str],
    implementations: Sequence[Implementation | None],
    copy: float,
    *,
    ragged: bool = False,
    peer: bool = True,
    repetitions: int = 20,
    seed: int = 0,
) -> Iterator[Row]:
    """Measures one shape: first the peer, then each preset by each implementation.

    Args:
        shape: of a call.
        presets: names in `PRESETS`.
        implementations: those of `sketch_attention`; None leaves the choice to it.
        copy: the bandwidth of a copy, bytes per second.
        ragged: whether rows see between half of the tokens and all, rather than all.
        peer: whether bf16 attention is measured too.
        repetitions: slopes whose median is reported.
        seed: of the random inputs.
    """
    stop = stops(shape, ragged=ragged, seed=seed)
    peer_seconds = None
    if peer:
        row, peer_seconds = _measure_peer(shape, stop, copy, ragged, repetitions, seed)
        yield row
    for preset in presets:
        inputs = _inputs(shape, PRESETS[preset], stop, seed)
        for implementation in implementations:
            row = Row(
                tuple(shape),
                ragged,
                preset,
                implementation or AUTO,
                "",
                int(stop.sum()) * shape.kv_heads * PRESETS[preset].bytes_per_token(shape.head_dim),
            )
            try:
                choice: Choice = choose(
                    inputs.queries[0], inputs.keys, inputs.values, implementation
                )
                timed = steady_time(_attend(choice), inputs, repetitions=repetitions)
            except (ValueError, ImportError, NotImplementedError, RuntimeError) as error:
                # What cannot run here must not cost the measurements that follow.
                yield replace(row, reason=_first_line(error))
                continue
            row = replace(row, implementation=choice.implementation, reason=choice.reason)
            row = row.timed(timed.seconds, copy, peer_seconds)
            yield replace(row, error=_error(inputs, timed.outputs))


def _measure_peer(
    shape: Shape, stop: np.ndarray, copy: float, ragged: bool, repetitions: int, seed: int
) -> tuple[Row, Seconds | None]:
    """bf16 attention to exact caches, as tokens-major arrays of their own for each layer."""
    implementation: Literal["cudnn", "xla"] = "cudnn" if jax.default_backend() == "gpu" else "xla"
    nbytes = 4 * shape.head_dim * shape.kv_heads
    row = Row(tuple(shape), ragged, BF16, implementation, "", int(stop.sum()) * nbytes)
    stored = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
    asked = (shape.batch, 1, shape.heads, shape.head_dim)
    layers = _rotation(shape.batch * shape.tokens * nbytes)
    lengths = jnp.asarray(stop) if ragged else None

    def step(arguments: Any, index: int, after: Array | None) -> Array:
        caches, queries, lengths = arguments
        return jax.nn.dot_product_attention(
            ordered(queries[index], after),
            *caches[index % layers],
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )

    rngs = iter(jax.random.split(jax.random.key(seed), 2 * layers + CALLS))
    try:
        caches = [
            tuple(jax.random.normal(next(rngs), stored, jnp.bfloat16) for _ in "kv")
            for _ in range(layers)
        ]
        queries = [jax.random.normal(next(rngs), asked, jnp.bfloat16) for _ in range(CALLS)]
        seconds = steady_time(step, (caches, queries, lengths), repetitions=repetitions).seconds
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return replace(row, reason=_first_line(error)), None
    return row.timed(seconds, copy, seconds), seconds


def _attend(choice: Choice) -> Step:
    def step(inputs: Inputs, index: int, after: Array | None) -> Array:
        query = inputs.queries[index]
        return sketch_attention(
            replace(query, vectors=ordered(query.vectors, after)),
            inputs.keys,
            inputs.values,
            inputs.layers[index % len(inputs.layers)],
            start=0,
            stop=inputs.stop,
            implementation=choice.implementation,
        ).output

    return step


def _inputs(shape: Shape, preset: Preset, stop: np.ndarray, seed: int) -> Inputs:
    layer = shape.batch * shape.kv_heads * shape.tokens * preset.bytes_per_token(shape.head_dim)
    return jax.block_until_ready(
        random_inputs(
            jax.random.key(seed),
            stop,
            shape=shape,
            preset=preset,
            layers=_rotation(layer),
            calls=CALLS,
        )
    )


def _rotation(nbytes: int) -> int:
    """Over how many caches of that size calls rotate: at least two."""
    wanted = _UNCACHEABLE if jax.default_backend() == "gpu" else 0
    return min(CALLS, max(2, ceil(wanted / nbytes)))


def _error(inputs: Inputs, outputs: Array) -> float:
    _, batch, _, heads, _ = outputs.shape
    errors = []
    # The first call reads the first row and head of the first layer, the next the last of the next.
    for call, row, head in ((0, 0, 0), (1, batch - 1, heads - 1)):
        expected = exact_answer(inputs, call, row, head)
        distance = np.linalg.norm(np.asarray(outputs[call, row, 0, head], np.float64) - expected)
        errors.append(float(distance / np.linalg.norm(expected)))
    return max(errors)


def _print_device(copy: float, options: argparse.Namespace) -> None:
    device = jax.devices()[0].device_kind
    versions = {name: number for name in _PACKAGES if (number := _version(name)) is not None}
    settings = {name: getattr(options, name) for name in ("repetitions", "seed", "copy_bytes")}
    if options.json:
        report = {"device": device, "versions": versions, "settings": settings}
        print(json.dumps({**report, "copy_bytes_per_second": copy}), flush=True)
        return
    named = ", ".join(f"{name} {found}" for name, found in versions.items())
    print(f"{device}; {named}; copy {copy / 1e9:.0f} GB/s\n")
    print(_line(_COLUMNS))
    print(_line(["---"] * len(_COLUMNS)), flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.sketch_attention.bench",
        description="Times sketch attention beside bf16 attention and a copy.",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        default=list(SHAPES),
        metavar="SHAPE",
        help="BATCH,KV_HEADS,GROUPS,TOKENS[,HEAD_DIM], or one of "
        + ", ".join(f"{name} ({shape})" for name, shape in SHAPES.items())
        + "; default: all of these",
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=tuple(PRESETS),
        default=["h1b", "h1b-256-v2"],
        metavar="PRESET",
        help=f"any of {', '.join(PRESETS)}; default: h1b h1b-256-v2",
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        choices=(AUTO, *get_args(Implementation)),
        default=[AUTO],
        metavar="NAME",
        help=f"any of {', '.join(get_args(Implementation))}, or auto, the default, which runs what "
        "the device is best served by",
    )
    parser.add_argument(
        "--ragged", action="store_true", help="let rows see between half of the tokens and all"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave bf16 attention out")
    parser.add_argument(
        "--repetitions", type=int, default=20, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--copy-bytes",
        type=int,
        default=1 << 30,
        metavar="N",
        help="of the array that is copied; default: 1 GiB",
    )
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
