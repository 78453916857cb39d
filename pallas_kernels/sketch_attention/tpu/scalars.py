"""Scalars of keys and values, from how they are stored to one float per token."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int32, UInt16

from pallas_kernels.sketch_attention.tpu.plan import LANES

_HALF = LANES // 2
_HIGH = -(1 << 16)


def split_pair(
    words: Int32[Array, "heads tokens"],
) -> tuple[Float32[Array, "heads tokens"], Float32[Array, "heads tokens"]]:
    """The two bf16 of each word, the high half first."""
    return pltpu.bitcast(words & _HIGH, jnp.float32), pltpu.bitcast(words << 16, jnp.float32)


def unpair(
    paired: UInt16[Array, "scalar_rows half_tokens"],
) -> Float32[Array, "heads tokens"]:
    """Key scalars from their pairs of rows.

    As words, 64 lanes hold a block of 128 tokens, the first half in the low halves. A register
    has two such blocks; exchanging its halves puts each where it is wanted.
    """
    words = pltpu.bitcast(paired, jnp.int32)
    heads, columns = words.shape
    upper = lax.broadcasted_iota(jnp.int32, (heads, LANES), 1) >= _HALF
    found = []
    for column in range(0, columns, LANES):
        width = min(LANES, columns - column)
        both = words[:, column : column + width]
        if width < LANES:
            both = jnp.concatenate([both, both], axis=1)
        exchanged = pltpu.roll(both, _HALF, 1)
        found.append(jnp.where(upper, exchanged & _HIGH, both << 16))
        if width == LANES:
            found.append(jnp.where(upper, both & _HIGH, exchanged << 16))
    return pltpu.bitcast(jnp.concatenate(found, axis=1), jnp.float32)
