"""Attention over a long stored sequence, one block of tokens at a time."""

from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.sketch_attention.partial import Partial, merge, softmax_partial

BLOCK = 1024
"""Tokens read at once: large enough to keep a device busy, small enough to bound the logits."""


class BlockScores(Protocol):
    """Logits of every query against `length` tokens from `first` on."""

    def __call__(
        self, first: Int32[Array, ""], length: int
    ) -> Float[Array, "batch kv_heads groups queries block"]: ...


class BlockValues(Protocol):
    """Values of `length` tokens from `first` on."""

    def __call__(
        self, first: Int32[Array, ""], length: int
    ) -> Float[Array, "batch kv_heads block head_dim"]: ...


def attend_blocks(
    scores: BlockScores,
    values: BlockValues,
    *,
    start: int,
    stop: Int32[Array, "batch queries"],
    capacity: int,
    kv_heads: int,
    query_shape: tuple[int, ...],
) -> Partial:
    """Attends to the stored tokens `start <= n < stop`, whatever form they are stored in.

    Blocks that no query sees are skipped at run time, so the cost follows the longest row and
    not the capacity; the scan can still be differentiated.

    Args:
        scores: reads the keys.
        values: reads the values; attention converts them to float32.
        start: the first token that may be seen.
        stop: for each query, one past the last token it sees.
        capacity: tokens stored, a multiple of 128.
        kv_heads: KV heads; consecutive query heads share one.
        query_shape: `(batch, queries, heads, head_dim)`, the shape of the output too.
    """
    batch, queries, heads, head_dim = query_shape
    shape = (batch, kv_heads, heads // kv_heads, queries)
    empty = Partial(
        jnp.zeros((*shape, head_dim), jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)
    )
    length = min(BLOCK, capacity)
    last = jnp.max(stop)

    def step(partial: Partial, index: Int32[Array, ""]) -> tuple[Partial, None]:
        wanted = index * length

        def attend(partial: Partial) -> Partial:
            # A last block that would overhang is read earlier, and its overlap hidden.
            first = jnp.minimum(wanted, capacity - length)
            position = first + jnp.arange(length, dtype=jnp.int32)
            visible = (position >= jnp.maximum(wanted, start)) & (position < stop[..., None])
            block = softmax_partial(
                scores(first, length), visible[:, None, None], values(first, length)
            )
            return merge(partial, block)

        return jax.lax.cond(wanted < last, attend, lambda unchanged: unchanged, partial), None

    blocks = jnp.arange(-(-capacity // length), dtype=jnp.int32)
    return heads_last(jax.lax.scan(step, empty, blocks)[0])


def heads_last(partial: Partial) -> Partial:
    """`[batch, kv_heads, groups, queries, …]` to `[batch, queries, heads, …]`."""
    batch, kv_heads, groups, queries = partial.lse.shape
    shape = (batch, queries, kv_heads * groups)
    return Partial(
        jnp.moveaxis(partial.output, 3, 1).reshape(*shape, -1),
        jnp.moveaxis(partial.lse, 3, 1).reshape(shape),
    )


def read_block(
    stacked: Array, layer: Int32[Array, ""], first: Int32[Array, ""], length: int, axis: int
) -> Array:
    """One layer's `length` entries from `first` on along `axis` of an array stacked over layers.

    Slicing the stack directly keeps a whole layer from being copied out of it.
    """
    begin = [jnp.int32(0)] * stacked.ndim
    begin[0], begin[axis] = layer, first
    sizes = list(stacked.shape)
    sizes[0], sizes[axis] = 1, length
    return jax.lax.dynamic_slice(stacked, begin, sizes)[0]
