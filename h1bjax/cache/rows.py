"""Whole rows read as a cache gives them, in parts that fused attention can run.

Query t reads token n exactly when n < S or n > t - W, and from its code otherwise. So the window
is attention with a band of width W, and what lies before it is causal attention of the queries
from W on: to the sinks as they are and to all others as they decode. Where scores treat the two
differently, the sinks are a third part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from h1bjax.cache.keys import CodecParameters, KeyCodec
from h1bjax.cache.scoring import sign_features, sketch_query, squared_code_norm
from h1bjax.cache.spec import CacheSpec
from h1bjax.cache.straight_through import SketchedKeys, signed_queries
from h1bjax.cache.window import as_window
from h1bjax.fused_attention import Implementation
from h1bjax.merged_attention import Part, merged_attention
from pallas_kernels.rotary import rotate
from pallas_kernels.sketch_attention import SketchQuery

_EXACT = jax.lax.Precision.HIGHEST
_VARIANCE_CHANNELS = 8


class CodedTokens(NamedTuple):
    """What a cache gives of tokens that are not read exactly.

    Attributes:
        keys: sketches, or decoded keys; None where keys are stored exactly.
        values: decoded; None where they are stored exactly.
    """

    keys: SketchedKeys | Float[Array, "batch tokens kv_heads head_dim"] | None
    values: Float[Array, "batch tokens kv_heads head_dim"] | None


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


def attend_rows(
    spec: CacheSpec,
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "#batch tokens"],
    coded: CodedTokens,
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    implementation: Implementation,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attention in which each query sees tokens as a cache of this spec would give them.

    Args:
        spec: of a cache that is not exact.
        query: after RoPE; head `h` reads KV head `h // (heads // kv_heads)`.
        keys: after RoPE.
        values: of the same tokens.
        positions: 0, 1, 2, … in each row; padding after them sees and gives anything.
        coded: the same tokens as they are stored.
        parameters: of this layer's key codec; None for exact keys.
        frequencies: RoPE frequencies, radians per token.
        implementation: of the attention to coded tokens and to the window.
    """
    parts = []
    recent_keys, recent_values = (as_window(x).astype(query.dtype) for x in (keys, values))
    if spec.window:
        parts.append(
            Part(
                query,
                recent_keys,
                recent_values,
                scale=query.shape[-1] ** -0.5,
                window=spec.window,
                implementation=implementation,
            )
        )
    if query.shape[1] <= spec.window:
        return merged_attention(parts)
    sinks = None
    if spec.sinks:
        sinks = _Sinks(recent_keys[:, : spec.sinks], recent_values[:, : spec.sinks])
    if spec.evict or query.shape[1] <= spec.exact_tokens:
        return merged_attention([*parts, *_sinks_alone(spec, query, sinks)])
    stored = CodedTokens(
        keys if coded.keys is None else coded.keys,
        values if coded.values is None else coded.values,
    )
    if not _reads_alike(spec):
        parts += _sinks_alone(spec, query, sinks)
        sinks = None
    parts.append(
        _older_part(spec, query, sinks, stored, positions, parameters, frequencies, implementation)
    )
    return merged_attention(parts)


def _reads_alike(spec: CacheSpec) -> bool:
    """Whether queries are multiplied with decoded keys just as with exact ones."""
    return spec.scores != "fitted" and not (spec.sketch is not None and spec.sketch.signed_query)


class _Sinks(NamedTuple):
    """Exact keys and values of the first tokens."""

    keys: Float[Array, "batch sinks kv_heads head_dim"]
    values: Float[Array, "batch sinks kv_heads head_dim"]


def _sinks_alone(
    spec: CacheSpec, query: Float[Array, "batch tokens heads head_dim"], sinks: _Sinks | None
) -> list[Part]:
    """Attention to the sinks that are no longer in the window, too few to be worth a kernel."""
    if sinks is None:
        return []
    # Query W + i sees the sinks 0 to i.
    scale = query.shape[-1] ** -0.5
    return [Part(query[:, spec.window :], *sinks, scale=scale, begin=spec.window)]


def _older_part(
    spec: CacheSpec,
    query: Float[Array, "batch tokens heads head_dim"],
    sinks: _Sinks | None,
    coded: CodedTokens,
    positions: Int32[Array, "#batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    implementation: Implementation,
) -> Part:
    """Attention to the tokens `n <= t - W`, from S on as their codes give them.

    Args:
        spec: of the cache.
        query: after RoPE.
        sinks: None leaves out the first S tokens.
        coded: all tokens.
        positions: of all tokens.
        parameters: of this layer's key codec; None where keys have none.
        frequencies: RoPE frequencies, radians per token.
        implementation: of the part.
    """
    head_dim, dtype = query.shape[-1], query.dtype
    keys, values = coded
    scale, shift = head_dim**-0.5, None
    if isinstance(keys, SketchedKeys):
        assert spec.sketch is not None and parameters is not None
        scale = spec.sketch.logit_scale(head_dim)
        scoring, shift = sketch_query(spec, spec.sketch, parameters, query, frequencies)
        block = None if spec.rope_period is None else positions - positions % spec.rope_period
        query, keys = _features(spec, spec.sketch, scoring, keys, block)
        if _reads_alike(spec):
            # Then the shift is the mean key alone, which can as well be part of every key.
            shift = None
            if spec.rope_period is None:
                more = keys.shape[-1] - head_dim
                keys = keys + jnp.pad(parameters.mean[...], ((0, 0), (0, more)))
    assert keys is not None and values is not None
    # Query W + i sees keys 0 to i, without the sinks query S + W + i sees keys S to S + i.
    stored = slice(spec.sinks, query.shape[1] - spec.window)
    keys, values = keys[:, stored].astype(dtype), values[:, stored].astype(dtype)
    begin = spec.exact_tokens
    if sinks is not None:
        begin = spec.window
        wide = jnp.pad(sinks.keys, ((0, 0), (0, 0), (0, 0), (0, keys.shape[-1] - head_dim)))
        keys = jnp.concatenate([wide, keys], axis=1)
        values = jnp.concatenate([sinks.values, values], axis=1)
    return Part(
        query[:, begin:].astype(dtype),
        keys,
        values,
        shift=None if shift is None else shift[:, begin:],
        scale=scale,
        begin=begin,
        implementation=implementation,
    )


def _features(
    spec: CacheSpec,
    codec: KeyCodec,
    scoring: SketchQuery,
    sketched: SketchedKeys,
    block: Int32[Array, "#batch tokens"] | None,
) -> tuple[
    Float[Array, "batch tokens heads channels"], Float[Array, "batch tokens kv_heads channels"]
]:
    """Vectors whose dot products, times the codec's logit scale, are the logits of `SketchQuery`.

    Args:
        spec: of the cache.
        codec: of its keys.
        scoring: how the queries score.
        sketched: the keys.
        block: where each token's RoPE block begins; None for an infinite period.
    """
    logit_scale = codec.logit_scale(scoring.vectors.shape[-1])
    temperature = jnp.asarray(scoring.scale)[:, None] / logit_scale
    signs, key_scale = sketched.signs, None
    if sketched.scale is not None:
        key_scale = sketched.scale.astype(jnp.float32)[..., None]
    if scoring.signed:
        query, keys = _signed(scoring), signs
    else:
        query = scoring.vectors
        keys = _decoded(signs, scoring.transform)
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
        energy = jnp.square(key_scale[..., 0]) * squared_code_norm(
            jax.lax.stop_gradient(signs), codec
        )
        query, keys = _with_product(query, keys, -scoring.variance / logit_scale, energy)
    return query, keys


@jax.custom_vjp
def _decoded(
    signs: Float[Array, "batch tokens kv_heads bits"],
    transform: Float[Array, "kv_heads head_dim bits"],
) -> Float[Array, "batch tokens kv_heads head_dim"]:
    """Keys short of their scalar. Their gradient is multiplied in the default precision.

    Only the forward pass has to agree with decoding, and exact products take several times longer.
    """
    return jnp.einsum("btkc,kdc->btkd", signs, transform, precision=_EXACT)


def _decoded_forward(signs: Array, transform: Array) -> tuple[Array, tuple[Array, Array]]:
    return _decoded(signs, transform), (signs, transform)


def _decoded_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    signs, transform = saved
    to_signs = jnp.einsum("btkd,kdc->btkc", gradient, transform)
    return to_signs, jnp.einsum("btkd,btkc->kdc", gradient, signs)


_decoded.defvjp(_decoded_forward, _decoded_backward)


def _signed(scoring: SketchQuery) -> Float[Array, "batch tokens heads bits"]:
    signs = jax.lax.stop_gradient(sign_features(scoring.vectors, scoring.transform))
    return signed_queries(scoring.vectors, scoring.transform, signs)


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
