"""Whole prompts through fused attention: the same result as from an empty cache.

Query t reads token n exactly when n < S or n > t - W, and from its code otherwise. So the coded
part is causal attention of the queries from S + W on to the decoded tokens from S on, the window
is attention with a band of width W, and the few sinks beyond it are the third part.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from h1bjax.cache.channel_keys import ChannelQuantisedKeys, EncodedKeyGroups
from h1bjax.cache.fill import EncodedChunk, encode_chunk, fill
from h1bjax.cache.keys import CodecParameters, EncodedKeys, KeyCodec
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.scoring import sign_features, sketch_query, squared_code_norm
from h1bjax.cache.spec import CacheSpec
from h1bjax.cache.window import as_window
from h1bjax.fused_attention import (
    Choice,
    Implementation,
    causal_attention,
    causal_partial,
    choose_implementation,
)
from pallas_kernels.exact_attention.reference import exact_logits
from pallas_kernels.rotary import rotate
from pallas_kernels.sketch_attention import Partial, SketchQuery, merge, softmax_partial
from pallas_kernels.sketch_attention.blocks import heads_last

_EXACT = jax.lax.Precision.HIGHEST
_VARIANCE_CHANNELS = 8


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


def attention_channels(spec: CacheSpec, head_dim: int) -> int:
    """Channels of the queries and keys whose dot products are the logits of coded tokens."""
    codec = spec.sketch
    if codec is None:
        return head_dim
    if codec.signed_query:
        return max(head_dim, codec.sketch_bits(head_dim))
    channels = head_dim
    if spec.rope_period is not None and spec.scores == "fitted":
        channels += head_dim
    if spec.scores == "corrected":
        channels += _VARIANCE_CHANNELS
    return channels


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
        parts = []
        if spec.window:
            parts += _exact_parts(spec, query, as_window(keys), as_window(values), implementation)
        if not spec.evict and query.shape[1] > spec.exact_tokens:
            parts.append(
                _coded_part(
                    spec,
                    query,
                    keys,
                    values,
                    positions,
                    encoded,
                    parameters,
                    frequencies,
                    implementation,
                )
            )
        output = reduce(merge, parts).output.astype(query.dtype)
    return jnp.where(positions[..., None, None] >= 0, output, 0), stored


def _exact_parts(
    spec: CacheSpec,
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    implementation: Implementation,
) -> list[Partial]:
    """Attention to the latest W tokens, and to those sinks that are no longer among them."""
    tokens, head_dim = query.shape[1], query.shape[-1]
    window = causal_partial(
        query,
        keys.astype(query.dtype),
        values.astype(query.dtype),
        head_dim**-0.5,
        spec.window,
        implementation,
    )
    if not spec.sinks:
        return [window]
    sink_keys, sink_values = (jnp.moveaxis(x[:, : spec.sinks], 2, 1) for x in (keys, values))
    t, n = jnp.arange(tokens)[:, None], jnp.arange(sink_keys.shape[2])
    logits = exact_logits(query, sink_keys)
    return [window, heads_last(softmax_partial(logits, n <= t - spec.window, sink_values))]


def _coded_part(
    spec: CacheSpec,
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    encoded: EncodedChunk,
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    implementation: Implementation,
) -> Partial:
    """Attention to the tokens `S <= n <= t - W` as their codes give them."""
    head_dim, dtype = query.shape[-1], query.dtype
    if spec.values is not None:
        assert encoded.values is not None
        values = spec.values.decode(encoded.values)
    scale, shift = head_dim**-0.5, None
    if isinstance(encoded.keys, EncodedKeyGroups):
        assert isinstance(spec.keys, ChannelQuantisedKeys)
        keys = rearrange(spec.keys.decode(encoded.keys), "b g n k d -> b (g n) k d")
    elif encoded.keys is not None:
        assert spec.sketch is not None and parameters is not None
        scale = spec.sketch.logit_scale(head_dim)
        scoring, shift = sketch_query(spec, spec.sketch, parameters, query, frequencies)
        block = None if spec.rope_period is None else positions - positions % spec.rope_period
        query, keys = _features(spec, spec.sketch, scoring, encoded.keys, block)
    # Query S + W + i sees keys S to S + i.
    begin, end = spec.exact_tokens, query.shape[1] - spec.window
    channels = max(query.shape[-1], head_dim)
    output, lse = causal_partial(
        _widened(query[:, begin:], channels, dtype),
        _widened(keys[:, spec.sinks : end], channels, dtype),
        _widened(values[:, spec.sinks : end], channels, dtype),
        scale,
        None,
        implementation,
    )
    if shift is not None:
        lse = lse + shift[:, begin:]
    return Partial(
        jnp.pad(output[..., :head_dim], ((0, 0), (begin, 0), (0, 0), (0, 0))),
        jnp.pad(lse, ((0, 0), (begin, 0), (0, 0)), constant_values=-jnp.inf),
    )


def _features(
    spec: CacheSpec,
    codec: KeyCodec,
    scoring: SketchQuery,
    encoded: EncodedKeys,
    block: Int32[Array, "batch tokens"] | None,
) -> tuple[
    Float[Array, "batch tokens heads channels"], Float[Array, "batch tokens kv_heads channels"]
]:
    """Vectors whose dot products, times the codec's logit scale, are the logits of `SketchQuery`.

    Args:
        spec: of the cache.
        codec: of its keys.
        scoring: how the queries score.
        encoded: the keys.
        block: where each token's RoPE block begins; None for an infinite period.
    """
    logit_scale = codec.logit_scale(scoring.vectors.shape[-1])
    temperature = jnp.asarray(scoring.scale)[:, None] / logit_scale
    key_scale = None if encoded.scale is None else encoded.scale.astype(jnp.float32)[..., None]
    if scoring.signed:
        query, keys = sign_features(scoring.vectors, scoring.transform), encoded.signs
    else:
        query = scoring.vectors
        keys = jnp.einsum("btkc,kdc->btkd", encoded.signs, scoring.transform, precision=_EXACT)
    query = temperature * query
    if key_scale is not None:
        keys = key_scale * keys
    if scoring.rope is not None:
        assert block is not None
        mean = jnp.broadcast_to(scoring.rope.mean, keys.shape)
        keys, mean = (rotate(x, block[..., None], scoring.rope.frequencies) for x in (keys, mean))
        if spec.scores == "fitted":
            # The mean is no part of the sketch, so the temperature must leave it alone.
            query = jnp.concatenate([query, scoring.vectors], axis=-1)
            keys = jnp.concatenate([keys, mean], axis=-1)
        else:
            keys = keys + mean
    if scoring.variance is not None and key_scale is not None:
        energy = jnp.square(key_scale[..., 0]) * squared_code_norm(encoded, codec)
        query, keys = _with_product(query, keys, -scoring.variance / logit_scale, energy)
    return query, keys


def _with_product(
    query: Float[Array, "batch tokens heads channels"],
    keys: Float[Array, "batch tokens kv_heads channels"],
    of_query: Float[Array, "batch tokens heads"],
    of_key: Float[Array, "batch tokens kv_heads"],
) -> tuple[
    Float[Array, "batch tokens heads more_channels"],
    Float[Array, "batch tokens kv_heads more_channels"],
]:
    """Adds `of_query · of_key` to all dot products, also where they are rounded to bf16."""
    query_high, query_low = _halves(of_query)
    key_high, key_low = _halves(of_key)

    def append(x: Array, *columns: Array) -> Array:
        extra = jnp.stack(columns, axis=-1)
        none = [(0, 0)] * (x.ndim - 1)
        return jnp.concatenate(
            [x, jnp.pad(extra, [*none, (0, _VARIANCE_CHANNELS - len(columns))])], axis=-1
        )

    return append(query, query_high, query_high, query_low), append(
        keys, key_high, key_low, key_high
    )


def _halves(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """What bf16 keeps of a number, and the rest."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high, x - high


def _widened(
    x: Float[Array, "batch tokens heads channels"], channels: int, dtype: jnp.dtype
) -> Float[Array, "batch tokens heads more_channels"]:
    missing = channels - x.shape[-1]
    return jnp.pad(x.astype(dtype), ((0, 0), (0, 0), (0, 0), (0, missing)))
