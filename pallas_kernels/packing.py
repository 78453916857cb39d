"""The one definition of how codes lie in memory.

Every packed array keeps tokens on its last axis and rows on the axis before it. A token's
codes fill one column of int32 words; a kernel reads rows of many tokens at once.

Inside a word, `R` words of `n`-bit fields are ordered so that a TPU can unpack them by
masking whole words and reinterpreting their four bytes as four int8 rows: bits
`8·b + n·p … 8·b + n·p + n - 1` of word `r` hold field `4·R·p + 4·r + b`, for byte `b` in 0…3
and plane `p` in 0…8/n - 1. Fields beyond the last are zero. A 3-bit code is stored as its two
low bits followed by its high bit, each packed as above.

16-bit floats are stored as their bit patterns in integer arrays, which every XLA backend updates
in place: before jax 0.11 the CPU backend converts a whole bf16 array to write one element. Two
scalars of a token share an int32 word, the first in its high half. One scalar per token is a
uint16 in a pair of rows of half the length, because TPUs hold 16-bit rows two to a sublane and
relay out arrays with an odd one: each block of 128 tokens puts tokens 0…63 in the first row of
the pair and tokens 64…127 in the second.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int, Int32, Shaped, UInt16

TOKEN_BLOCK = 128
"""Capacities are multiples of this many tokens."""
VALUE_BITS = (4, 3, 2)
"""Widths of a value's code."""

_HALF = TOKEN_BLOCK // 2
_WORD_BITS = 32
_BYTES = 4
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}


def words_per_column(fields: int, width: int) -> int:
    """How many int32 words hold one token's `fields` codes of `width` bits.

    Raises:
        ValueError: `width` is not 1, 2, 3 or 4.
    """
    return sum(-(-fields * bits // _WORD_BITS) for bits in _planes(width))


def pack_column(
    codes: Int[Array, "*batch fields"] | Bool[Array, "*batch fields"], width: int
) -> Int32[Array, "*batch words"]:
    """Packs codes in `[0, 2**width)`, of which higher bits are ignored, along the last axis.

    Raises:
        ValueError: `width` is not 1, 2, 3 or 4.
    """
    packed, low = [], 0
    for bits in _planes(width):
        packed.append(_pack_plane((codes.astype(jnp.int32) >> low) & (2**bits - 1), bits))
        low += bits
    return jnp.concatenate(packed, axis=-1)


def unpack_rows(
    words: Int32[Array, "*batch words tokens"], width: int, fields: int
) -> Int32[Array, "*batch fields tokens"]:
    """Inverse of `pack_column`, for rows of words with tokens on the last axis.

    Raises:
        ValueError: `width` is not 1, 2, 3 or 4, or `words` has another number of rows than
            `fields` codes need.
    """
    if words.shape[-2] != words_per_column(fields, width):
        raise ValueError(
            f"{fields} codes of {width} bits need {words_per_column(fields, width)} rows of words, "
            f"got {words.shape[-2]}"
        )
    codes, row, low = jnp.int32(0), 0, 0
    for bits in _planes(width):
        rows = words_per_column(fields, bits)
        plane = _unpack_plane(words[..., row : row + rows, :], bits)[..., :fields, :]
        codes, row, low = codes + (plane << low), row + rows, low + bits
    return codes


def scalar_index(
    position: Int32[Array, "*batch"], capacity: int
) -> tuple[Int32[Array, "*batch"], Int32[Array, "*batch"]]:
    """Where the single scalar of a token lies: its row of the pair, and its column.

    A position at or beyond `capacity` gives a column beyond the array, so that a scatter with
    `mode="drop"` leaves it out.
    """
    half = (position % TOKEN_BLOCK) // _HALF
    column = (position // TOKEN_BLOCK) * _HALF + position % _HALF
    return half, jnp.where(position < capacity, column, capacity)


def storage_dtype(dtype: DTypeLike) -> jnp.dtype:
    """In what floats of a dtype are stored: uint16 where they have 16 bits, else themselves."""
    return jnp.dtype(jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype)


def to_storage(floats: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Floats as they are stored; their dtype must be kept to read them back."""
    return jax.lax.bitcast_convert_type(floats, storage_dtype(floats.dtype))


def from_storage(stored: Shaped[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Inverse of `to_storage`."""
    return jax.lax.bitcast_convert_type(stored, jnp.dtype(dtype))


def pack_scalars(
    scalars: BFloat16[Array, "*batch heads tokens"],
) -> UInt16[Array, "*batch rows half_tokens"]:
    """Single scalars of whole blocks of 128 tokens, in their pairs of rows: `rows = 2·heads`."""
    return rearrange(
        to_storage(scalars),
        "... heads (block half lane) -> ... (heads half) (block lane)",
        half=2,
        lane=_HALF,
    )


def unpack_scalars(
    paired: UInt16[Array, "*batch rows half_tokens"],
) -> Float32[Array, "*batch heads tokens"]:
    """Inverse of `pack_scalars`, as float32."""
    bits = rearrange(
        paired,
        "... (heads half) (block lane) -> ... heads (block half lane)",
        half=2,
        lane=_HALF,
    )
    return from_storage(bits, jnp.bfloat16).astype(jnp.float32)


def pack_scalar_pair(
    high: BFloat16[Array, "*batch"], low: BFloat16[Array, "*batch"]
) -> Int32[Array, "*batch"]:
    """Two scalars of a token in one word."""
    upper, lower = (to_storage(half).astype(jnp.int32) for half in (high, low))
    return (upper << 16) | lower


def unpack_scalar_pair(
    words: Int32[Array, "*batch"],
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """Inverse of `pack_scalar_pair`, as float32: a bf16 is the high half of a float32."""
    high, low = words & -(1 << 16), words << 16
    return (
        jax.lax.bitcast_convert_type(high, jnp.float32),
        jax.lax.bitcast_convert_type(low, jnp.float32),
    )


def _planes(width: int) -> tuple[int, ...]:
    if width not in _PLANES:
        raise ValueError(f"codes of {width} bits are not supported; use 1, 2, 3 or 4")
    return _PLANES[width]


def _shifts(bits: int) -> Int32[Array, "planes 1 bytes"]:
    plane = jnp.arange(8 // bits, dtype=jnp.int32)[:, None, None]
    byte = jnp.arange(_BYTES, dtype=jnp.int32)
    return 8 * byte + bits * plane


def _pack_plane(codes: Int32[Array, "*batch fields"], bits: int) -> Int32[Array, "*batch words"]:
    fields = codes.shape[-1]
    words = words_per_column(fields, bits)
    padding = words * (_WORD_BITS // bits) - fields
    padded = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    grouped = rearrange(
        padded, "... (plane word byte) -> ... plane word byte", word=words, byte=_BYTES
    )
    return jax.lax.reduce(
        grouped << _shifts(bits), jnp.int32(0), jax.lax.bitwise_or, (codes.ndim - 1, codes.ndim + 1)
    )


def _unpack_plane(
    words: Int32[Array, "*batch words tokens"], bits: int
) -> Int32[Array, "*batch fields tokens"]:
    shifts = _shifts(bits)[..., None]
    fields = (words[..., None, :, None, :] >> shifts) & (2**bits - 1)
    return rearrange(fields, "... plane word byte tokens -> ... (plane word byte) tokens")
