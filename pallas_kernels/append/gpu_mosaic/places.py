"""Where a block of threads finds and leaves things: arrays, shared memory, its token."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.append.arguments import KeyEncoder
from pallas_kernels.mosaic_gpu import ptx, registers
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, Bool

ROWS = 8
"""Rows of the batch in a block."""
WARPS = 2 * ROWS
"""Warps in a block."""

# Rows of these many more numbers start in other banks of shared memory.
_KEY_PADDING, _PRODUCT_PADDING = 16, 4


@dataclass(frozen=True)
class GlobalArray:
    """A dense array in global memory.

    Attributes:
        address: of its first byte.
        shape: its sizes.
        dtype: its elements'.
    """

    address: I64
    shape: tuple[int, ...]
    dtype: jnp.dtype

    def at(self, *indices: I32 | int) -> I64:
        """The address of an element; all indices but the last make one number of 32 bits."""
        *outer, last = indices
        row = registers.I32.constant(0)
        for index, size in zip(outer, self.shape, strict=False):
            row = row * size + index
        return self.address + (row.wide() * self.shape[-1] + last) * self.dtype.itemsize

    def floats(self, lane: I32, *outer: I32 | int) -> list[F32]:
        """A line of floats along the last axis, spread over the lanes of a warp."""
        address = self.at(*outer, lane)
        offsets = [32 * i * self.dtype.itemsize for i in range(self.shape[-1] // 32)]
        if self.dtype.itemsize == 4:
            return [ptx.load(address, offset)[0].as_float() for offset in offsets]
        halves = [ptx.load_half(address, offset) for offset in offsets]
        if self.dtype == jnp.bfloat16:
            return [(half << 16).as_float() for half in halves]
        return [ptx.from_float16(half) for half in halves]


@dataclass(frozen=True)
class Layout:
    """Where things lie in a block's shared memory, in bytes from its beginning.

    Attributes:
        head_dim: channels of a key.
        matrices: the encoder's matrices by name, each with its first line among all lines.
        lines: of all matrices together.
        bits: of a sketch.
    """

    head_dim: int
    matrices: dict[str, int]
    lines: int
    bits: int

    @classmethod
    def of(cls, encoder: KeyEncoder) -> "Layout":
        """That for an encoder."""
        found, lines = {}, 0
        for name in ("projection", "reading", "metric"):
            matrix = getattr(encoder, name)
            if matrix is not None:
                found[name] = lines
                lines += matrix.shape[-2]
        return cls(encoder.projection.shape[-1], found, lines, encoder.bits)

    @property
    def key_row(self) -> int:
        """Bytes from one row's centred key to the next."""
        return 4 * (self.head_dim + _KEY_PADDING)

    @property
    def codes(self) -> int:
        """The codes of the values, a word each: a row of `head_dim` for each row of the batch."""
        return ROWS * self.key_row

    @property
    def levels(self) -> int:
        """The encoder's levels, then its weights."""
        return self.codes + ROWS * 4 * self.head_dim

    @property
    def product_row(self) -> int:
        """Bytes from one row's products to the next."""
        return 4 * (self.lines + _PRODUCT_PADDING)

    @property
    def products(self) -> int:
        """Every line times every row's key: first over half of the channels, then the rest."""
        return self.levels + 8 * self.bits

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.products + 2 * ROWS * self.product_row


@dataclass(frozen=True)
class Place:
    """Where a warp works.

    Attributes:
        thread: its thread's number in the block.
        shared: address of the block's shared memory.
        head: the KV head.
        layer: the cache's layer.
        row: of the batch.
        position: where to write the row's token.
        inside: whether to write it.
    """

    thread: I32
    shared: I32
    head: I32
    layer: I32
    row: I32
    position: I32
    inside: Bool

    @property
    def lane(self) -> I32:
        """The thread's number in its warp."""
        return self.thread & 31

    @property
    def member(self) -> I32:
        """Which of the block's rows the warp has."""
        return (self.thread >> 5) & (ROWS - 1)


def one_if(condition: Bool) -> I32:
    """1 where it holds, else 0."""
    return registers.select(condition, registers.I32.constant(1), registers.I32.constant(0))
