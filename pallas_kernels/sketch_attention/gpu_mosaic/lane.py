"""Where a thread of the kernel stands, and where what it reads lies."""

from dataclasses import dataclass

from pallas_kernels.mosaic_gpu.launch import Block
from pallas_kernels.mosaic_gpu.registers import I32, I64
from pallas_kernels.sketch_attention.gpu_mosaic.plan import TILE, Plan


@dataclass(frozen=True)
class Operands:
    """Byte addresses of what a call reads and writes; None for what it does not have."""

    layer: I64
    stop: I64
    key_words: I64
    key_scales: I64 | None
    value_words: I64
    value_affine: I64
    scale: I64 | None
    queries: I64 | None
    fragments: I64 | None
    norm: I64 | None
    signs: I64 | None
    variance: I64 | None
    frequencies: I64 | None
    mean: I64 | None
    output: I64
    lse: I64


@dataclass(frozen=True)
class Lane:
    """Where a thread stands in its warp, and what its block works on."""

    plan: Plan
    block: Block
    operands: Operands
    layer: I32
    batch: I32
    head: I32

    @property
    def row(self) -> I32:
        """Row of the lane, 0…7."""
        return self.block.lane >> 2

    @property
    def column(self) -> I32:
        """Column of the lane, 0…3."""
        return self.block.lane & 3

    @property
    def token(self) -> I32:
        """The first of four tokens of a tile whose keys the lane reads.

        Rows 2c and 2c + 1 meet the values that column c reads: four tokens from each half of the
        tile.
        """
        return (self.row >> 1) * 4 + (self.row & 1) * (TILE // 2)

    def stacked(self, base: I64, rows: int, row_words: int | None = None) -> I64:
        """Address of the block's rows in an array stacked over layers, rows and KV heads."""
        plan = self.plan
        index = (self.layer * plan.batch + self.batch) * plan.kv_heads + self.head
        return base + index.wide() * (4 * rows * (row_words or plan.tokens))

    def head_index(self) -> I32:
        """Index of the KV head among those of all rows of the batch."""
        return self.batch * self.plan.kv_heads + self.head
