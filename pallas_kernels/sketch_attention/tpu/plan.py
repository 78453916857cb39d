"""What is known of a call before it runs, and how the work is divided."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from pallas_kernels.packing import words_per_column
from pallas_kernels.sketch_attention.tpu.key_tiles import KeyTile, divide_rows

SUBLANES = 8
"""Rows of a vector register; also the least rows of float32 and int32 that are not padded."""
LANES = 128
"""Columns of a vector register; tokens lie along them."""

Method = Literal["mxu", "popcount"]


@dataclass(frozen=True)
class Plan:
    """Shapes, features and division of one call of the kernel.

    A grid step reads `block` tokens of `step_heads` KV heads of one row of the batch.

    Attributes:
        batch: rows.
        kv_heads: KV heads.
        groups: query heads of a KV head.
        head_dim: channels of a value.
        bits: of a sketch.
        value_bits: width of a value's code.
        tokens: capacity.
        start: first token that is seen.
        scaled: whether keys have a scalar.
        variance: whether scores are corrected by their variance.
        code_planes: bits per component of a key's code.
        period: RoPE period; None if infinite.
        method: "popcount" compares bits with those of a signed query, "mxu" multiplies matrices.
        query_planes: int8 numbers that a coefficient of a query is divided into, 1 or 2.
        step_heads: KV heads of a grid step.
        block: tokens of a grid step.
    """

    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    bits: int
    value_bits: int
    tokens: int
    start: int
    scaled: bool
    variance: bool
    code_planes: int
    period: int | None
    method: Method
    query_planes: int
    step_heads: int
    block: int

    @property
    def steps(self) -> int:
        """Grid steps over the heads of a row."""
        return self.kv_heads // self.step_heads

    @property
    def blocks(self) -> int:
        """Grid steps over the tokens of a row; the last may overhang."""
        return -(-self.tokens // self.block)

    @property
    def rows(self) -> int:
        """Query heads of a KV head, padded to whole registers."""
        return -(-self.groups // SUBLANES) * SUBLANES

    @property
    def key_words(self) -> int:
        """Words of a sketch."""
        return self.bits // 32

    @property
    def value_words(self) -> int:
        """Words of a value's codes."""
        return words_per_column(self.head_dim, self.value_bits)

    @property
    def code_width(self) -> int:
        """Bits of a code that lie together: 3-bit codes have their high bits apart."""
        return 4 if self.value_bits == 4 else 2

    @property
    def code_words(self) -> int:
        """Words of a value that hold those bits."""
        return words_per_column(self.head_dim, self.code_width)

    @property
    def channels(self) -> int:
        """Channels that the words of a value have room for."""
        return self.code_words * 32 // self.code_width

    @cached_property
    def key_tiles(self) -> tuple[KeyTile, ...]:
        """How the rows of words of one grid step are multiplied.

        Where queries are turned, computing coefficients costs more than multiplying bits by them,
        so heads do not share a tile, in which they would have columns of zeros.
        """
        return divide_rows(self.step_heads, self.key_words, apart=self.period is not None)

    @property
    def contraction(self) -> int:
        """Rows of the largest tile, unpacked."""
        return max(tile.contraction for tile in self.key_tiles)

    @cached_property
    def _places(self) -> list[tuple[KeyTile, int]]:
        """Tile and place in it of each head of a grid step, up to where they repeat."""
        together = self.key_tiles[0].heads
        different = together if self.step_heads % together == 0 else self.step_heads
        return [(self.key_tiles[head // together], head % together) for head in range(different)]

    @property
    def placement(self) -> np.ndarray:
        """`KeyTile.placement` of each different head: `[heads, bits, contraction]`."""
        return np.stack([self._pad(tile.placement(head), 0.0) for tile, head in self._places])

    @property
    def powers(self) -> np.ndarray:
        """What set bits of each different head are unpacked to: `[heads, 1, contraction]`."""
        return np.stack(
            [self._pad(tile.powers(self.unshifted)[None], 1.0) for tile, _ in self._places]
        )

    def _pad(self, columns: np.ndarray, value: float) -> np.ndarray:
        missing = self.contraction - columns.shape[1]
        padded = np.pad(columns, [(0, 0), (0, missing)], constant_values=value)
        return padded.astype(np.float32)

    @property
    def unshifted(self) -> int:
        """Planes of bits that are read between two shifts.

        Bits that are not shifted down read as powers of two, which coefficients are divided by;
        one signed byte has no room for that.
        """
        return 4 if self.query_planes == 2 else 1

    @property
    def periods(self) -> int:
        """RoPE blocks of a grid step."""
        return 0 if self.period is None else self.block // self.period
