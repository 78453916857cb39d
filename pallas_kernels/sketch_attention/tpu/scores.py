"""Products of queries with the bits of keys, inside the kernel."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32

from pallas_kernels.sketch_attention.tpu.key_tiles import logical_right
from pallas_kernels.sketch_attention.tpu.plan import Plan

_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
_LOW_NIBBLES = 0x0F0F0F0F


def multiplied(
    coefficients: list[Int8[Array, "tile_rows contraction"]],
    words: Int32[Array, "key_rows tokens"],
    plan: Plan,
) -> list[Int32[Array, "rows tokens"]]:
    """For each head of the grid step, `Σ n·b` of whole coefficients and unpacked bits."""
    sums = []
    for own, tile in zip(coefficients, plan.key_tiles, strict=True):
        products = lax.dot_general(
            own[:, : tile.contraction],
            tile.unpack(words, plan.unshifted),
            _ROWS_BY_COLUMNS,
            preferred_element_type=jnp.int32,
        )
        for head in range(tile.heads):
            first = head * plan.query_planes * plan.rows
            high = products[first : first + plan.rows]
            if plan.query_planes == 1:
                sums.append(high)
            else:
                low = products[first + plan.rows : first + 2 * plan.rows]
                sums.append((high << 8) + low)
    return sums


def compared(
    signs: list[Int32[Array, "rows key_words"]],
    words: Int32[Array, "key_rows tokens"],
    plan: Plan,
) -> list[Int32[Array, "rows tokens"]]:
    """For each head of the grid step, how many bits of a key differ from those of a query."""
    shape = (plan.rows, words.shape[1])
    counts = []
    for head, own in enumerate(signs):
        count = jnp.zeros(shape, jnp.int32)
        for word in range(plan.key_words):
            row = head * plan.key_words + word
            differing = jnp.broadcast_to(words[row : row + 1], shape) ^ own[:, word : word + 1]
            count += lax.population_count(differing)
        counts.append(count)
    return counts


def squared_code_norms(
    words: Int32[Array, "key_rows tokens"], plan: Plan
) -> Int32[Array, "heads tokens"]:
    """`‖2a + a'‖² = Σ (5 + 4·a·a')` of each head, where a' lies four bits above a in a byte."""
    differing = lax.population_count((words ^ logical_right(words, 4)) & _LOW_NIBBLES)
    heads = [
        jnp.sum(differing[head * plan.key_words : (head + 1) * plan.key_words], 0, keepdims=True)
        for head in range(plan.step_heads)
    ]
    components = plan.bits // 2
    return 9 * components - 8 * jnp.concatenate(heads)
