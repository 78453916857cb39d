"""What is known of a call before it runs, and how the work is divided."""

from dataclasses import dataclass
from functools import cached_property

from pallas_kernels.mosaic_gpu.launch import WARPS
from pallas_kernels.mosaic_gpu.merging import Merging
from pallas_kernels.packing import words_per_column

TILE = 32
"""Tokens that a warp reads at once."""
COLUMNS = 8
"""Columns of a matrix operand; query heads take columns."""


@dataclass(frozen=True)
class Plan:
    """Shapes, features and division of one call of the kernel.

    A warp reads tiles of 32 tokens. Each tile is multiplied with one or two operands of eight
    columns, which hold query heads. Where the RoPE period is finite, the coefficients of a query
    change from block to block: a warp computes two such operands at once, and two blocks share
    the columns of one if there are at most four heads.

    Attributes:
        layers: of the cache.
        batch: rows.
        kv_heads: KV heads.
        groups: query heads of a KV head.
        head_dim: channels of a value.
        bits: of a sketch.
        value_bits: width of a value's code.
        tokens: capacity.
        start: first token that is seen.
        scale: factor of all heads; None if heads have their own.
        scaled: whether keys have a scalar.
        signed: whether queries are signs.
        variance: whether scores are corrected by their variance.
        planes: bits per component of a key's code.
        period: RoPE period; None if infinite.
        stacked_transform: whether transforms come for all layers.
        stages: tiles that a warp has under way.
        splits: parts into which a row's tokens are divided, each for one block of threads.
        warpgroups: groups of four warps in a block of threads.
    """

    layers: int
    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    bits: int
    value_bits: int
    tokens: int
    start: int
    scale: float | None
    scaled: bool
    signed: bool
    variance: bool
    planes: int
    period: int | None
    stacked_transform: bool
    stages: int
    splits: int
    warpgroups: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.groups

    @property
    def warps(self) -> int:
        """Warps of a block of threads."""
        return WARPS * self.warpgroups

    @property
    def key_words(self) -> int:
        """Words of a sketch."""
        return self.bits // 32

    @property
    def key_reads(self) -> int:
        """Words of a sketch that a lane reads: four lanes share a token."""
        return -(-self.key_words // 4)

    @property
    def halved(self) -> bool:
        """Whether two lanes share a word of a sketch: each takes half of the bits of its bytes."""
        return halved(self.bits) and not self.signed

    @property
    def bit_steps(self) -> int:
        """Bits of a byte that a lane takes."""
        return bit_steps(self.bits)

    @property
    def products(self) -> int:
        """Products of queries and transform that give all coefficients."""
        return self.key_reads * self.bit_steps

    @property
    def transform_bytes(self) -> int:
        """Bytes of the prepared transform of a KV head."""
        return self.products * self.slices * 512

    @property
    def query_bytes(self) -> int:
        """From one query to the next in shared memory, so that neighbours lie in other banks."""
        return 4 * self.head_dim + 32

    @property
    def value_words(self) -> int:
        """Words of a value's codes."""
        return words_per_column(self.head_dim, self.value_bits)

    @property
    def affine_row(self) -> int:
        """Where a tile in shared memory has scales and zeros: rows of 32 words, keys first."""
        return self.key_words + self.value_words

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile in shared memory: the last row, of scalars, is half full."""
        return (self.affine_row + (2 if self.scaled else 1)) * 4 * TILE

    @property
    def slices(self) -> int:
        """Steps of 16 channels in which a query is transformed."""
        return self.head_dim // 16

    @property
    def operands(self) -> int:
        """Operands of eight columns that every tile is multiplied with."""
        return -(-self.groups // COLUMNS)

    @property
    def stride(self) -> int:
        """Columns from the heads of one RoPE block to those of the next in the same operand."""
        return COLUMNS if self.operands > 1 else 1 << (self.groups - 1).bit_length()

    @property
    def shared_blocks(self) -> int:
        """RoPE blocks whose heads share an operand."""
        return 1 if self.period is None else min(2, COLUMNS // self.stride)

    @property
    def sets(self) -> int:
        """Operands that are computed at once."""
        return self.operands if self.period is None else 2

    @property
    def tiles_per_block(self) -> int:
        """Tiles of a RoPE block."""
        return 1 if self.period is None else self.period // TILE

    @property
    def tiles_per_set(self) -> int:
        """Consecutive tiles that use the same operands."""
        return self.shared_blocks * self.tiles_per_block

    @property
    def tiles_per_group(self) -> int:
        """Consecutive tiles that one warp reads: those whose operands are computed at once."""
        if self.period is None or self.operands > 1:
            return self.tiles_per_set
        return self.sets * self.tiles_per_set

    @property
    def merging(self) -> Merging:
        """How what the warps found is added up."""
        return Merging(
            warps=self.warps,
            columns=self.operands * COLUMNS,
            groups=self.groups,
            stride=self.stride,
            copies=self.shared_blocks,
            head_dim=self.head_dim,
            splits=self.splits,
        )

    @cached_property
    def shared(self) -> "SharedMemory":
        """Where things lie in a block's shared memory."""
        finite = self.period is not None
        sizes = {
            "tiles": self.warps * self.stages * self.tile_bytes,
            "transform": self.transform_bytes if finite else 0,
            "queries": self.groups * self.query_bytes if finite else 0,
            "mean": self.head_dim * 4 if finite else 0,
            "turns": self.head_dim * 2 if finite else 0,
            "further": self.head_dim * 4 if finite else 0,
            "coefficients": self.coefficient_bytes * (self.warps if finite else 1),
            "columns": self.warps * self.column_bytes,
        }
        places = {}
        end = 0
        for name, size in sizes.items():
            places[name] = end
            end += -(-size // 16) * 16
        # Once all tiles are read, the same memory serves to add up what the warps found.
        return SharedMemory(**places, size=max(end, self.merging.shared_bytes))

    @property
    def coefficient_bytes(self) -> int:
        """Bytes of the operands that are computed at once."""
        return 0 if self.signed else self.sets * self.key_reads * 2048

    @property
    def column_bytes(self) -> int:
        """Bytes of what a warp knows of the columns of its operands."""
        return self.sets * (1 + self.shared_blocks) * COLUMNS * 4


@dataclass(frozen=True)
class SharedMemory:
    """Byte offsets into a block's shared memory, and its size."""

    tiles: int
    transform: int
    queries: int
    mean: int
    turns: int
    further: int
    coefficients: int
    columns: int
    size: int


def halved(bits: int) -> bool:
    """Whether a sketch is too short for four lanes to have a word each."""
    return bits == 64


def bit_steps(bits: int) -> int:
    """Bits of a byte that a lane takes of a sketch."""
    return 4 if halved(bits) else 8
