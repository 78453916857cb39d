"""What the TPU kernel costs, read off its compiled schedules: `python -m …tpu_cost`.

Needs libtpu but no TPU: kernels are compiled ahead of time, and the compiler writes down the
instruction bundles that a core issues, one per cycle. Prints a page of Markdown.
"""

import argparse
import os
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.packing import words_per_column
from pallas_kernels.sketch_attention.arguments import (
    BlockRope,
    PackedKeys,
    PackedValues,
    SketchQuery,
)
from pallas_kernels.sketch_attention.tpu import plan_of, sketch_attention

TOKENS = 65536
UNIT = 1024
_LAYERS = 2
_START = 4


@dataclass(frozen=True)
class Chip:
    """A generation of TPU, as its vendor describes it.

    Attributes:
        topology: what libtpu calls four of them.
        bandwidth: bytes per second that one core can read from memory.
        clock: cycles per second, from the peak rate of bfloat16 products.
    """

    topology: str
    bandwidth: float
    clock: float

    def bundles(self, nbytes: float) -> float:
        """Cycles in which as many bytes arrive from memory."""
        return nbytes / self.bandwidth * self.clock


CHIPS = {
    "v5e": Chip("v5e:2x2", 819e9, 1.5e9),
    # Two cores share a chip's memory.
    "v5p": Chip("v5p:2x2x1", 2765e9 / 2, 1.75e9),
    "v6e": Chip("v6e:2x2", 1640e9, 1.75e9),
}


@dataclass(frozen=True)
class Variant:
    """A cache and the queries that read it; the default is one plane of signs with its scalar."""

    head_dim: int = 128
    bits: int = 128
    value_bits: int = 4
    kv_heads: int = 8
    groups: int = 8
    scaled: bool = True
    signed: bool = False
    variance: bool = False
    planes: int = 1
    period: int | None = None

    @property
    def bytes_per_token(self) -> int:
        """Of one KV head."""
        values = 4 * words_per_column(self.head_dim, self.value_bits) + 4
        return self.bits // 8 + 2 * self.scaled + values


PLAIN = Variant()
VARIANTS = {
    "1 plane + scalar, 4-bit values": PLAIN,
    "same, G = 1": replace(PLAIN, groups=1),
    "same, G = 4": replace(PLAIN, groups=4),
    "same, G = 16": replace(PLAIN, groups=16),
    "same, 4 KV heads": replace(PLAIN, kv_heads=4),
    "same, 1 KV head": replace(PLAIN, kv_heads=1),
    "same, variance correction": replace(PLAIN, variance=True),
    "no scalar, 4-bit values": replace(PLAIN, scaled=False),
    "1 plane + scalar, 3-bit values": replace(PLAIN, value_bits=3),
    "1 plane + scalar, 2-bit values": replace(PLAIN, value_bits=2),
    "256 bits + scalar, 4-bit values": replace(PLAIN, bits=256),
    "256 bits + scalar, 2-bit values": replace(PLAIN, bits=256, value_bits=2),
    "2 planes, variance, 2-bit values": replace(
        PLAIN, bits=256, value_bits=2, planes=2, variance=True
    ),
    "256 signs, signed query": replace(PLAIN, bits=256, scaled=False, signed=True),
    "128 signs, signed query": replace(PLAIN, scaled=False, signed=True),
    "D = 64": replace(PLAIN, head_dim=64, bits=64),
    "D = 96": replace(PLAIN, head_dim=96, bits=96),
    "D = 256": replace(PLAIN, head_dim=256, bits=256, kv_heads=4),
    "RoPE period 32, G = 4": replace(PLAIN, period=32, groups=4),
    "RoPE period 128, G = 4": replace(PLAIN, period=128, groups=4),
}


class Cost(NamedTuple):
    """Of `UNIT` tokens of one KV head, in cycles.

    Attributes:
        bundles: that the core issues.
        vector: the least in which its vector units could do their share.
        matrix: likewise of its matrix units.
    """

    bundles: float
    vector: float
    matrix: float


def measure(variant: Variant, chip: Chip, folder: Path) -> Cost:
    """Compiles a variant and reads its schedule.

    Args:
        variant: of the kernel.
        chip: to compile for.
        folder: where libtpu was told to write its schedules.
    """
    known = set(folder.iterdir())
    query, keys, values, layer, stop = _shapes(variant)
    plan = plan_of(query, keys, values, _START)
    devices = topologies.get_topology_desc(chip.topology, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("chip",), axis_types=(AxisType.Auto,))
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        (query, keys, values, layer, stop),
    )

    def attend(query: Any, keys: Any, values: Any, layer: Any, stop: Any) -> Any:
        return sketch_attention(query, keys, values, layer, start=_START, stop=stop)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(attend).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    written = [path for path in folder.iterdir() if path not in known]
    return _read(written, plan.block * plan.step_heads / UNIT)


def _shapes(variant: Variant) -> tuple[Any, ...]:
    kv_heads, heads = variant.kv_heads, variant.kv_heads * variant.groups

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def words(rows: int) -> Any:
        return array(jnp.int32, _LAYERS, 1, rows, TOKENS)

    scales = array(jnp.uint16, _LAYERS, 1, 2 * kv_heads, TOKENS // 2)
    rope = None
    if variant.period is not None:
        rope = BlockRope(
            array(jnp.float32, variant.head_dim // 2),
            array(jnp.float32, kv_heads, variant.head_dim),
            variant.period,
        )
    query = SketchQuery(
        array(jnp.float32, 1, 1, heads, variant.head_dim),
        array(jnp.float32, kv_heads, variant.head_dim, variant.bits),
        array(jnp.float32, heads),
        variance=array(jnp.float32, 1, 1, heads) if variant.variance else None,
        rope=rope,
        signed=variant.signed,
        planes=variant.planes,
    )
    value_words = kv_heads * words_per_column(variant.head_dim, variant.value_bits)
    keys = PackedKeys(words(kv_heads * variant.bits // 32), scales if variant.scaled else None)
    values = PackedValues(words(value_words), words(kv_heads), variant.value_bits)
    return query, keys, values, array(jnp.int32), array(jnp.int32, 1, 1)


def _read(written: list[Path], units: float) -> Cost:
    """The part of a kernel's schedule that handles a block of which every token is seen."""
    own = [path for path in written if "sketch_attention" in path.name]
    (schedule,) = (
        path
        for path in own
        if path.name.endswith("final_bundles.txt") and "schedule-analysis" not in path.name
    )
    (table,) = (path for path in own if path.name.endswith("per-bundle-utilization.txt"))
    bounds, count = [0], 0
    for line in schedule.read_text().splitlines():
        # Bundles are numbered; a mark before the colon begins another part of the program.
        found = re.match(r" *(?:0x[0-9a-f]+|0) +((?:[A-Z]{2} *)*):", line)
        if found:
            if found[1]:
                bounds.append(count)
            count += 1
    parts = [(end - begin, begin) for begin, end in zip(bounds, [*bounds[1:], count], strict=True)]
    # Blocks that are seen in part come next, and cost a little more.
    length, begin = next(part for part in parts if part[0] > 0.6 * max(parts)[0])
    heading, limits, *rows = [
        line for line in table.read_text().splitlines() if line and "==" not in line
    ]
    names = [name.strip() for name in heading.split(",")]
    used = np.array([row.split() for row in rows[begin : begin + length]], int).sum(axis=0)
    least = dict(zip(names, used / np.array(limits.split(), int) / units, strict=True))
    return Cost(length / units, least["VALU"], least["MXU"])


def page(costs: dict[str, dict[str, Cost]]) -> str:
    """The report, from the costs of each variant on each chip."""
    parts = [_INTRODUCTION]
    for name in next(iter(costs.values())):
        chip = CHIPS[name]
        parts.append(f"## {name}\n")
        parts.append(
            "| case | bytes | bundles | of them vector | of them matrix | memory | "
            "bf16 cache | times faster |\n|---|--:|--:|--:|--:|--:|--:|--:|"
        )
        for label, by_chip in costs.items():
            variant, cost = VARIANTS[label], by_chip[name]
            memory = chip.bundles(UNIT * variant.bytes_per_token)
            exact = chip.bundles(UNIT * 4 * variant.head_dim)
            figures = (cost.bundles, cost.vector, cost.matrix, memory, exact)
            rounded = " | ".join(f"{figure:.0f}" for figure in figures)
            faster = exact / max(cost.bundles, memory)
            parts.append(f"| {label} | {variant.bytes_per_token} | {rounded} | {faster:.1f} |")
        parts.append("")
    return "\n".join([*parts, _NOTES])


_INTRODUCTION = f"""# What the TPU kernel costs: a static estimate

These figures are read off the schedules that libtpu {{version}} compiles ahead
of time for real chips; nothing here was measured. `python -m
pallas_kernels.sketch_attention.tpu_cost` prints this page.

The unit is {UNIT} tokens of one KV head, with D = 128, 8 KV heads and G = 8 query heads for each
unless a row says otherwise.

- *bundles*: instruction bundles that a core issues for a block of which every token is seen. A
  bundle takes a cycle if it need not wait; waits for memory and between grid steps are left out.
- *vector*, *matrix*: the cycles that the vector units, or the matrix units, need at least for
  their part of it. Where bundles are well above both, the schedule is bound by the time until
  results arrive, not by the number of operations.
- *memory*: the cycles in which the same bytes arrive from HBM at its nominal rate.
- *bf16 cache*: likewise for keys and values in bfloat16.
- *times faster*: the bf16 cache's memory time by the larger of bundles and memory.

Cores of v5e and v6e read {CHIPS["v5e"].bandwidth / 1e9:.0f} and {CHIPS["v6e"].bandwidth / 1e9:.0f}
GB/s at {CHIPS["v5e"].clock / 1e9} and {CHIPS["v6e"].clock / 1e9} GHz; the two cores of a v5p
share 2765 GB/s at {CHIPS["v5p"].clock / 1e9} GHz.
"""


_NOTES = """## What bounds the kernel

Matrix units multiply in the order of the program: first the bits of all keys, then head by head
the codes of values, which they transpose as they take them. On v5e one takes a register of bits in
four cycles and one of codes in six to eight, and has eight of each to take in the first row: 80 to
96 of its cycles. On v6e one takes a pair of registers of bits in four cycles, during which the
vector units, with only bits to unpack, are half idle: 32 of the first row's bundles, 64 of those
with 256 bits. Multiplying bits between the values of heads, one to six tiles ahead, was tried and
took up to 22 bundles more. In the rest the vector units have most to do: some fifteen operations
on every logit. Without the products of weights and values the first row takes 49 bundles on v5e
and 47 on v6e. Summing the values of one block beside the softmax of the next was tried and gained
nothing at these block lengths.

Three-bit values cost most to unpack: the rows of a head do not begin at a register's. A finite
RoPE period costs two to four times the rest, for the products that turn queries into coefficients
for each of its blocks; it is worth its time where memory counts for more.

## Choices

- Queries that are not signed are multiplied by bits on the matrix unit, as two signed bytes per
  coefficient. One byte would save 2 bundles on v5e and lose 8 bits.
- Signed queries are compared by counting bits on the vector unit. The matrix unit takes 126
  bundles instead of 122 with 256 bits on v5e, 100 instead of 98 with 128 bits; on v6e 114 instead
  of 119, and 87 instead of 92.
- Scalars are repeated for all queries by loads from scratch memory, not by the vector units: this
  saves 6 bundles of the first row on both.
- Weights are scaled to whole numbers by a bound of the largest, found together with the largest
  logit, not by the largest itself: 6 bundles less on v5e, 2 on v6e.
- Blocks are long: with 16384 tokens times heads in a grid step, half of the default, the first row
  takes 105 bundles on v5e and 99 on v6e. Beyond the default, too much is fetched for short rows.
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Static costs of the TPU kernel, as Markdown.")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        version = _prepare_libtpu(folder)
        costs = {
            label: {
                name: measure(VARIANTS[label], CHIPS[name], Path(folder)) for name in chosen.chips
            }
            for label in chosen.variants
        }
    sys.stdout.write(page(costs).format(version=version))


def _prepare_libtpu(folder: str) -> str:
    """Has libtpu write schedules to a folder and look for no TPU; it reads this when loaded."""
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError as error:
        raise SystemExit(
            'schedules are compiled by libtpu; install it: pip install "h1bjax[tpu]"'
        ) from error
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*final.*"
    )
    for name, value in {
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    return version


if __name__ == "__main__":
    main()
