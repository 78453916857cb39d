"""Whole prompts through fused attention: the same result as from an empty cache."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from h1bjax.cache.channel_keys import ChannelQuantisedKeys, EncodedKeyGroups
from h1bjax.cache.fill import EncodedChunk, encode_chunk, fill
from h1bjax.cache.keys import CodecParameters
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.rows import CodedTokens, attend_rows, attention_channels
from h1bjax.cache.spec import CacheSpec
from h1bjax.cache.straight_through import SketchedKeys
from h1bjax.fused_attention import (
    Choice,
    Implementation,
    causal_attention,
    choose_implementation,
)


def choose_prefill(spec: CacheSpec, dtype: DTypeLike, head_dim: int, *, exact: bool) -> Choice:
    """How prompts attend to themselves on the default device, and why.

    "cudnn" is `fill_and_attend`. "xla" is `append_and_attend`, which reads what it has stored
    back in blocks: slower, but it takes any shape and dtype and never holds all scores.

    Args:
        spec: of the cache.
        dtype: the compute dtype.
        head_dim: channels of a key.
        exact: whether prompts are read exactly.
    """
    channels = head_dim if exact else attention_channels(spec, head_dim)
    return choose_implementation(dtype, channels)


def fill_and_attend(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    *,
    exact_chunk: bool,
    implementation: Implementation,
) -> tuple[Float[Array, "batch tokens heads head_dim"], KVCache]:
    """`append_and_attend` for the first tokens of every row. It has no gradient.

    Args:
        cache: holds no tokens.
        layer: which layer of the cache.
        query: after RoPE; head `h` reads KV head `h // (heads // kv_heads)`.
        keys: after RoPE.
        values: of the same tokens.
        positions: 0, 1, 2, … in each row, then -1 for padding, whose queries give 0.
        parameters: of this layer's key codec; None for exact keys.
        frequencies: RoPE frequencies, radians per token.
        exact_chunk: whether queries read all tokens exactly.
        implementation: of the attention to coded tokens and to the window.
    """
    spec = cache.spec
    encoded = encode_chunk(spec, keys, values, positions, parameters, frequencies)
    stored = fill(cache, layer, keys, values, positions, encoded)
    if spec.exact or exact_chunk:
        output = causal_attention(query, keys, values)
    else:
        coded = CodedTokens(_read_keys(spec, encoded), _read_values(spec, encoded))
        output = attend_rows(
            spec,
            query,
            keys,
            values,
            positions,
            coded,
            parameters,
            frequencies,
            implementation,
        )
    return _without_gradient(jnp.where(positions[..., None, None] >= 0, output, 0)), stored


@jax.custom_jvp
def _without_gradient(
    output: Float[Array, "batch tokens heads head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Refuses a gradient, which would take the codes for constants."""
    return output


@_without_gradient.defjvp
def _refuse_gradient(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "a prompt that fills a cache has no gradient; differentiate training_attention"
    )


def _read_keys(
    spec: CacheSpec, encoded: EncodedChunk
) -> SketchedKeys | Float[Array, "batch tokens kv_heads head_dim"] | None:
    if isinstance(encoded.keys, EncodedKeyGroups):
        assert isinstance(spec.keys, ChannelQuantisedKeys)
        return rearrange(spec.keys.decode(encoded.keys), "b g n k d -> b (g n) k d")
    if encoded.keys is None:
        return None
    return SketchedKeys(encoded.keys.signs, encoded.keys.scale)


def _read_values(
    spec: CacheSpec, encoded: EncodedChunk
) -> Float[Array, "batch tokens kv_heads head_dim"] | None:
    if encoded.values is None:
        return None
    assert spec.values is not None
    return spec.values.decode(encoded.values)
