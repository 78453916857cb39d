"""Attention of a chunk of new tokens to a cache and to themselves."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from h1bjax.cache.append import append
from h1bjax.cache.exact import exact_logits, exact_scores, exact_values
from h1bjax.cache.keys import CodecParameters
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.scoring import sketch_query
from h1bjax.cache.window import is_exact, window_positions, write_window
from pallas_kernels.sketch_attention import (
    PackedKeys,
    PackedValues,
    Partial,
    merge,
    sketch_attention,
    softmax_partial,
)
from pallas_kernels.sketch_attention.blocks import attend_blocks, heads_last
from pallas_kernels.sketch_attention.reference import packed_values, sketch_scores


def append_and_attend(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    *,
    exact_chunk: bool = False,
) -> tuple[Float[Array, "batch tokens heads head_dim"], KVCache]:
    """One layer's attention: stores the chunk, then lets each query see all tokens up to its own.

    Query t reads token n exactly when n < S or n > t - W, and from the store otherwise; the
    softmaxes over the two parts merge by their log-sum-exp.

    Args:
        cache: holds `cache.lengths` tokens per row; lengths do not advance here.
        layer: which layer of the cache.
        query: after RoPE; head `h` reads KV head `h // (heads // kv_heads)`.
        keys: after RoPE.
        values: of the same tokens.
        positions: as `KVCache.accepts` wants them; queries at -1 give 0.
        parameters: of this layer's key codec; None for exact keys.
        frequencies: RoPE frequencies, radians per token.
        exact_chunk: whether queries read all of their own chunk exactly (exact prefill), and
            only older tokens from the store.
    """
    stored = append(cache, layer, keys, values, positions, parameters, frequencies)
    stop = positions - cache.spec.window + 1
    exact_chunk = exact_chunk and cache.spec.keys is not None
    if exact_chunk:
        stop = jnp.minimum(stop, cache.lengths[:, None])
    partial = _attend_stored(stored, layer, query, parameters, frequencies, stop)
    if cache.window_keys is not None or exact_chunk:
        exact = _attend_exact(cache, layer, query, keys, values, positions, exact_chunk)
        partial = merge(partial, exact)
    if cache.window_keys is not None:
        stored = write_window(stored, layer, _window(keys), _window(values), positions)
    return partial.output.astype(query.dtype), stored


def _attend_stored(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    stop: Int32[Array, "batch tokens"],
) -> Partial:
    spec, head_dim = cache.spec, cache.head_dim
    shift: Float[Array, "batch tokens heads"] | float = 0.0
    packed = None
    if spec.values is not None:
        assert cache.value_words is not None and cache.value_affine is not None
        packed = PackedValues(cache.value_words, cache.value_affine, spec.values.bits)
    if spec.keys is None:
        assert cache.keys is not None
        kv_heads = cache.keys.shape[-1] // head_dim
        scores = exact_scores(cache.keys, layer, query, kv_heads)
    else:
        assert parameters is not None and cache.key_words is not None
        scoring, shift = sketch_query(spec, spec.keys, parameters, query, frequencies)
        sketched = PackedKeys(cache.key_words, cache.key_scales)
        if packed is not None:
            partial = sketch_attention(
                scoring, sketched, packed, layer, start=spec.sinks, stop=stop
            )
            return Partial(partial.output, partial.lse + shift)
        kv_heads = scoring.transform.shape[0]
        scores = sketch_scores(scoring, sketched, layer)
    if packed is not None:
        read_values = packed_values(packed, layer, head_dim)
    else:
        assert cache.values is not None
        read_values = exact_values(cache.values, layer, kv_heads)
    partial = attend_blocks(
        scores,
        read_values,
        start=spec.sinks,
        stop=stop,
        capacity=cache.capacity,
        kv_heads=kv_heads,
        query_shape=query.shape,
    )
    return Partial(partial.output, partial.lse + shift)


def _attend_exact(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    exact_chunk: bool,
) -> Partial:
    """Attention to the window as it was before the chunk, and to the chunk itself."""
    kv_heads = keys.shape[2]
    chunk = (keys, values) if exact_chunk else (_round(keys), _round(values))
    seen = _causal(positions, positions)
    visible = seen if exact_chunk else seen & is_exact(cache, positions, positions)
    exact_keys, exact_values = (x.astype(jnp.float32) for x in chunk)
    if cache.window_keys is not None and cache.window_values is not None:
        old = window_positions(cache)
        old_keys, old_values = (
            rearrange(array[layer], "b s (k d) -> b s k d", k=kv_heads).astype(jnp.float32)
            for array in (cache.window_keys, cache.window_values)
        )
        exact_keys = jnp.concatenate([old_keys, exact_keys], axis=1)
        exact_values = jnp.concatenate([old_values, exact_values], axis=1)
        in_window = _causal(positions, old) & is_exact(cache, positions, old)
        visible = jnp.concatenate([in_window, visible], axis=2)
    by_head = rearrange(exact_keys, "b s k d -> b k s d")
    return heads_last(
        softmax_partial(
            exact_logits(query, by_head),
            visible[:, None, None],
            rearrange(exact_values, "b s k d -> b k s d"),
        )
    )


def _causal(
    query: Int32[Array, "batch queries"], key: Int32[Array, "batch keys"]
) -> Bool[Array, "batch queries keys"]:
    return (key[:, None] >= 0) & (key[:, None] <= query[..., None])


def _window(x: Float[Array, "batch tokens kv_heads head_dim"]) -> Array:
    return rearrange(x, "b t k d -> b t (k d)").astype(jnp.bfloat16)


def _round(x: Float[Array, "batch tokens kv_heads head_dim"]) -> Array:
    """What a token reads as once it lies in the window."""
    return x.astype(jnp.bfloat16)
