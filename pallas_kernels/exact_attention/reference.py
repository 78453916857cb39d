"""The definition of attention over exact keys and values, in plain jax.numpy."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.packing import from_storage
from pallas_kernels.sketch_attention.blocks import (
    BlockScores,
    BlockValues,
    attend_blocks,
    read_block,
)
from pallas_kernels.sketch_attention.partial import Partial


def exact_attention(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Shaped[Array, "layers batch tokens channels"],
    values: Shaped[Array, "layers batch tokens channels"],
    layer: Int32[Array, ""],
    *,
    dtype: jnp.dtype,
    start: int,
    stop: Int32[Array, "batch queries"],
) -> Partial:
    """See `pallas_kernels.exact_attention.exact_attention`."""
    head_dim = query.shape[-1]
    return attend_blocks(
        exact_scores(keys, dtype, layer, query),
        exact_vectors(values, dtype, layer, head_dim),
        start=start,
        stop=stop,
        capacity=keys.shape[2],
        kv_heads=keys.shape[3] // head_dim,
        query_shape=query.shape,
    )


def exact_logits(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Float[Array, "batch kv_heads keys head_dim"],
) -> Float[Array, "batch kv_heads groups queries keys"]:
    """`q·k/√D`, accumulated in float32; bf16 queries and keys are multiplied as they are."""
    dtype = jnp.promote_types(query.dtype, keys.dtype)
    logits = jnp.einsum(
        "bkgqd,bktd->bkgqt",
        rearrange(query.astype(dtype), "b q (k g) d -> b k g q d", k=keys.shape[1]),
        keys.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return logits / query.shape[-1] ** 0.5


def exact_scores(
    keys: Shaped[Array, "layers batch tokens channels"],
    dtype: jnp.dtype,
    layer: Int32[Array, ""],
    query: Float[Array, "batch queries heads head_dim"],
) -> BlockScores:
    """Logits of the queries against any block of one layer's exact keys."""
    read = exact_vectors(keys, dtype, layer, query.shape[-1])
    return lambda first, length: exact_logits(query, read(first, length))


def exact_vectors(
    stored: Shaped[Array, "layers batch tokens channels"],
    dtype: jnp.dtype,
    layer: Int32[Array, ""],
    head_dim: int,
) -> BlockValues:
    """The vectors of any block of one layer, in the dtype in which they were stored."""

    def read(first: Int32[Array, ""], length: int) -> Float[Array, "batch kv_heads block head_dim"]:
        block = from_storage(read_block(stored, layer, first, length, axis=2), dtype)
        return rearrange(block, "b t (k d) -> b k t d", d=head_dim)

    return read
