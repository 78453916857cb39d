"""Attention to keys and values that are stored as they are."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels.sketch_attention.blocks import BlockScores, BlockValues, read_block


def exact_logits(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Float[Array, "batch kv_heads keys head_dim"],
) -> Float[Array, "batch kv_heads groups queries keys"]:
    """`q·k/√D` in float32."""
    grouped = rearrange(query.astype(jnp.float32), "b q (k g) d -> b k g q d", k=keys.shape[1])
    logits = jnp.einsum(
        "bkgqd,bktd->bkgqt",
        grouped,
        keys.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return logits / query.shape[-1] ** 0.5


def exact_scores(
    keys: Float[Array, "layers batch tokens channels"],
    layer: Int32[Array, ""],
    query: Float[Array, "batch queries heads head_dim"],
    kv_heads: int,
) -> BlockScores:
    """Logits of the queries against any block of one layer's exact keys."""
    read = exact_values(keys, layer, kv_heads)
    return lambda first, length: exact_logits(query, read(first, length))


def exact_values(
    values: Float[Array, "layers batch tokens channels"], layer: Int32[Array, ""], kv_heads: int
) -> BlockValues:
    """Float32 vectors of any block of one layer."""

    def read(first: Int32[Array, ""], length: int) -> Float[Array, "batch kv_heads block head_dim"]:
        block = read_block(values, layer, first, length, axis=2).astype(jnp.float32)
        return rearrange(block, "b t (k d) -> b k t d", k=kv_heads)

    return read
