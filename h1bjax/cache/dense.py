"""Attention without a cache: the same result from keys decoded at once, for a whole sequence.

It shares the codecs with the cache and nothing else, so each checks the other.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from h1bjax.cache.channel_keys import ChannelQuantisedKeys
from h1bjax.cache.keys import CodecParameters, KeyCodec
from h1bjax.cache.scoring import encode_keys, half_variance, sign_features, squared_code_norm
from h1bjax.cache.spec import CacheSpec
from pallas_kernels.exact_attention.reference import exact_logits
from pallas_kernels.rotary import rotate
from pallas_kernels.sketch_attention import softmax_partial
from pallas_kernels.sketch_attention.blocks import heads_last

_EXACT = jax.lax.Precision.HIGHEST


def dense_attention(
    spec: CacheSpec,
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Causal attention in which each query sees tokens as a cache of this spec would give them.

    Args:
        spec: the cache to be imitated; `exact` is ordinary attention.
        query: after RoPE; head `h` reads KV head `h // (heads // kv_heads)`.
        keys: after RoPE.
        values: of the same tokens.
        positions: -1 marks padding, which is not seen and whose queries give 0. Keys quantised
            per channel need rows 0, 1, 2, … that are padded on the right.
        parameters: of this layer's key codec; None for exact keys.
        frequencies: RoPE frequencies, radians per token.
    """
    t, n = positions[:, :, None], positions[:, None, :]
    causal = (n >= 0) & (n <= t)
    exact = (n < spec.sinks) | (n > t - spec.window)
    if spec.exact:
        return _attend(exact_logits(query, _by_head(keys)), causal, values).astype(query.dtype)

    window_keys, window_values = keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
    window_logits = exact_logits(query, _by_head(window_keys))
    if spec.evict:
        return _attend(window_logits, causal & exact, window_values).astype(query.dtype)
    if spec.keys is None:
        logits = exact_logits(query, _by_head(keys))
    elif isinstance(spec.keys, ChannelQuantisedKeys):
        decoded = _channel_quantised(spec.keys, window_keys)
        logits = exact_logits(query, _by_head(decoded))
    else:
        assert parameters is not None
        logits = sketched_logits(spec, spec.keys, parameters, query, keys, positions, frequencies)
    stored = values if spec.values is None else spec.values.decode(spec.values.encode(values))
    if not spec.window:
        return _attend(logits, causal, stored).astype(query.dtype)

    # One softmax over both readings of every token, of which each query sees just one.
    both_logits = jnp.concatenate([logits, window_logits], axis=-1)
    both_visible = jnp.concatenate([causal & ~exact, causal & exact], axis=-1)
    both_values = jnp.concatenate([stored, window_values.astype(jnp.float32)], axis=1)
    return _attend(both_logits, both_visible, both_values).astype(query.dtype)


def _channel_quantised(
    codec: ChannelQuantisedKeys, keys: Float[Array, "batch tokens kv_heads head_dim"]
) -> Float[Array, "batch tokens kv_heads head_dim"]:
    """The keys as they are read once their group is complete; arbitrary in a group that is not."""
    tokens = keys.shape[1]
    whole = jnp.pad(keys, ((0, 0), (0, -tokens % codec.group), (0, 0), (0, 0)))
    encoded = codec.encode(rearrange(whole, "b (g n) k d -> b g n k d", n=codec.group))
    decoded = rearrange(codec.decode(encoded), "b g n k d -> b (g n) k d")
    return decoded[:, :tokens]


def sketched_logits(
    spec: CacheSpec,
    codec: KeyCodec,
    parameters: CodecParameters,
    query: Float[Array, "batch queries heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    frequencies: Float[Array, "half_dim"],
) -> Float[Array, "batch kv_heads groups queries keys"]:
    """Logits of queries, which have their full RoPE, against sketches of keys.

    Args:
        spec: says how scores are repaired, and the RoPE period.
        codec: of its keys.
        parameters: of this layer.
        query: any queries of the same rows.
        keys: after RoPE.
        positions: of the keys.
        frequencies: RoPE frequencies, radians per token.
    """
    kv_heads, head_dim = keys.shape[2:]
    encoded = encode_keys(spec, codec, parameters, keys, positions, frequencies)
    transform = codec.query_transform(parameters)
    mean = jnp.broadcast_to(parameters.mean[...], (keys.shape[0], 1, kv_heads, head_dim))
    if codec.signed_query:
        read, features = sign_features(query, transform), encoded.signs
    else:
        read = query
        features = jnp.einsum("btkc,kdc->btkd", encoded.signs, transform, precision=_EXACT)
    if encoded.scale is not None:
        features = features * encoded.scale.astype(jnp.float32)[..., None]
    if spec.rope_period is not None:
        block = (positions - positions % spec.rope_period)[..., None]
        features, mean = (rotate(x, block, frequencies) for x in (features, mean))
    # exact_logits divides by the root of the feature dimension, the codec has its own scale.
    scale = codec.logit_scale(head_dim) * read.shape[-1] ** 0.5
    logits = exact_logits(read, _by_head(features)) * scale
    if spec.scores == "fitted":
        logits = logits * _by_group(parameters.temperature[...], kv_heads)
        logits = logits + _by_group(parameters.offset[...], kv_heads)
    variance = half_variance(spec, codec, query)
    if variance is not None and encoded.scale is not None:
        energy = jnp.square(encoded.scale.astype(jnp.float32)) * squared_code_norm(
            encoded.signs, codec
        )
        by_query = rearrange(variance, "b q (k g) -> b k g q 1", k=kv_heads)
        logits = logits - by_query * rearrange(energy, "b t k -> b k 1 1 t")
    return logits + exact_logits(query, _by_head(mean))


def _attend(
    logits: Float[Array, "batch kv_heads groups queries keys"],
    visible: Bool[Array, "batch queries keys"],
    values: Float[Array, "batch keys kv_heads head_dim"],
) -> Float[Array, "batch queries heads head_dim"]:
    partial = softmax_partial(logits, visible[:, None, None], _by_head(values))
    return heads_last(partial).output


def _by_head(
    x: Float[Array, "batch tokens kv_heads channels"],
) -> Float[Array, "batch kv_heads tokens channels"]:
    return jnp.moveaxis(x, 2, 1)


def _by_group(
    per_head: Float[Array, "heads"], kv_heads: int
) -> Float[Array, "kv_heads groups 1 1"]:
    return rearrange(per_head, "(k g) -> k g 1 1", k=kv_heads)
