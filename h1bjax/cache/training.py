"""Attention of whole rows as through a compressed cache, with a gradient."""

import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from h1bjax.cache.channel_keys import ChannelQuantisedKeys
from h1bjax.cache.keys import CodecParameters
from h1bjax.cache.rows import CodedTokens, attend_rows, attention_channels
from h1bjax.cache.scoring import relative_keys
from h1bjax.cache.spec import CacheSpec
from h1bjax.cache.straight_through import SketchedKeys, straight_through, with_surrogate
from h1bjax.cache.window import as_window
from h1bjax.fused_attention import Choice, causal_attention, choose_implementation
from h1bjax.merged_attention import SAVED


def choose_training(spec: CacheSpec, dtype: DTypeLike, head_dim: int) -> Choice:
    """How whole rows are attended to on the default device when a gradient is wanted, and why.

    "cudnn" never holds the weights of the attention; "xla" holds them all, in float32.
    """
    return choose_implementation(dtype, attention_channels(spec, head_dim))


def training_attention(
    spec: CacheSpec,
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "#batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """What a prompt of whole rows gets from an empty cache of this spec, with a gradient.

    Codes are those of the cache, with the gradient of their surrogate, see
    `h1bjax.cache.straight_through`.

    Args:
        spec: of the cache.
        query: after RoPE; head `h` reads KV head `h // (heads // kv_heads)`.
        keys: after RoPE.
        values: of the same tokens.
        positions: 0, 1, 2, … in each row; padding may only follow all other tokens.
        parameters: of this layer's key codec; None where keys have none.
        frequencies: RoPE frequencies, radians per token.
    """
    if spec.exact:
        return causal_attention(query, keys, values)
    coded = CodedTokens(
        _coded_keys(spec, keys, positions, parameters, frequencies), _coded_values(spec, values)
    )
    chosen = choose_training(spec, query.dtype, query.shape[-1]).implementation
    return attend_rows(spec, query, keys, values, positions, coded, parameters, frequencies, chosen)


def _coded_keys(
    spec: CacheSpec,
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "#batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
) -> SketchedKeys | Float[Array, "batch tokens kv_heads head_dim"] | None:
    if spec.keys is None:
        return None
    if isinstance(spec.keys, ChannelQuantisedKeys):
        tokens, group = keys.shape[1], spec.keys.group
        recent = as_window(keys)
        whole = jnp.pad(recent, ((0, 0), (0, -tokens % group), (0, 0), (0, 0)))
        encoded = spec.keys.encode(rearrange(whole, "b (g n) k d -> b g n k d", n=group))
        decoded = rearrange(spec.keys.decode(encoded), "b g n k d -> b (g n) k d")
        return straight_through(decoded[:, :tokens], recent)
    assert parameters is not None
    if spec.rope_period is not None:
        keys = relative_keys(keys, positions, spec.rope_period, frequencies)
    # Encoding is exact in float32, and slower than to keep the few bytes that it gives.
    encoded_keys = checkpoint_name(spec.keys.encode(parameters, keys), SAVED)
    sketched = SketchedKeys(encoded_keys.signs, encoded_keys.scale)
    return with_surrogate(spec.keys.encoder(parameters), keys, sketched)


def _coded_values(
    spec: CacheSpec, values: Float[Array, "batch tokens kv_heads head_dim"]
) -> Float[Array, "batch tokens kv_heads head_dim"] | None:
    if spec.values is None:
        return None
    # A value lies between the least and the greatest of its codes, so nothing is cut off.
    return straight_through(spec.values.decode(spec.values.encode(values)), values)
