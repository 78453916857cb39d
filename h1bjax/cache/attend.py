"""Attention of a chunk of new tokens to a cache and to themselves."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from h1bjax.cache.append import append, append_one, appends_in_one_step
from h1bjax.cache.channel_keys import ChannelQuantisedKeys, channel_scores
from h1bjax.cache.keys import CodecParameters
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.prefill import choose_prefill, fill_and_attend
from h1bjax.cache.prepared import PreparedCodec
from h1bjax.cache.scoring import sketch_query
from h1bjax.cache.sequence_shard import SequenceShard
from h1bjax.cache.window import (
    as_window,
    is_exact,
    read_window,
    window_positions,
    write_window,
)
from pallas_kernels.exact_attention import choose, exact_attention
from pallas_kernels.exact_attention.reference import exact_logits, exact_scores, exact_vectors
from pallas_kernels.rotary import rotate
from pallas_kernels.sketch_attention import (
    PackedKeys,
    PackedValues,
    Partial,
    PreparedTransform,
    merge,
    sketch_attention,
    softmax_partial,
)
from pallas_kernels.sketch_attention.blocks import BlockScores, attend_blocks, heads_last
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
    fresh: bool = False,
    prepared: PreparedCodec | None = None,
    shard: SequenceShard | None = None,
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
        fresh: whether the caller knows that the cache holds no tokens at all. Where fused
            attention can run then it does, see `choose_prefill`; it has no gradient.
        prepared: the key codec of all layers. Given that, a single token is stored in one step,
            which has no gradient.
        shard: which of the tokens this cache stores, where several share them; its window is
            whole. Attention to the store is then merged over all shards.
    """
    if fresh:
        choice = choose_prefill(cache.spec, query.dtype, cache.head_dim, exact=exact_chunk)
        if choice.implementation == "cudnn":
            return fill_and_attend(
                cache,
                layer,
                query,
                keys,
                values,
                positions,
                parameters,
                frequencies,
                exact_chunk=exact_chunk,
                implementation="cudnn",
            )
    # An exact cache holds the chunk as it is, so there is nothing to read elsewhere.
    exact_chunk = exact_chunk and not cache.spec.exact
    # The slot that one new token overwrites holds the very token that its query no longer reads
    # exactly. Writing before anything is read spares a copy of the window.
    single = query.shape[1] == 1 and not exact_chunk
    window_first = bool(cache.spec.window) and single
    if prepared is not None and single and appends_in_one_step(cache.spec, cache.head_dim):
        stored = append_one(
            cache, layer, keys, values, positions, prepared.encoder, frequencies, shard
        )
        if window_first and shard is not None:
            stored = write_window(stored, layer, keys, values, positions)
    else:
        if window_first:
            cache = write_window(cache, layer, keys, values, positions)
        stored = append(cache, layer, keys, values, positions, parameters, frequencies, shard)
    stop = positions - cache.spec.window + 1
    if exact_chunk:
        stop = jnp.minimum(stop, cache.lengths[:, None])
    transform = None if prepared is None else prepared.transform
    attend = partial(
        _attend_stored, stored, layer, query, parameters, frequencies, transform=transform
    )
    if shard is None:
        found = attend(start=cache.spec.sinks, stop=stop)
    else:
        found = shard.merge(_attend_shard(shard, attend, cache.spec.sinks, shard.stop(stop)))
    if window_first:
        found = merge(found, _attend_window(stored.advance(positions), layer, query, positions))
    elif cache.spec.window or exact_chunk:
        found = merge(
            found, _attend_chunk(cache, layer, query, keys, values, positions, exact_chunk)
        )
        if cache.spec.window:
            stored = write_window(stored, layer, keys, values, positions)
    return found.output.astype(query.dtype), stored


def _attend_shard(
    shard: SequenceShard,
    attend: Callable[..., Partial],
    sinks: int,
    stop: Int32[Array, "batch tokens"],
) -> Partial:
    """Attention to the tokens of one shard; the first shard alone has the sinks, at its start."""
    attend = partial(attend, stop=stop, shard=shard)
    if not sinks:
        return attend(start=0)
    return jax.lax.cond(shard.index == 0, lambda: attend(start=sinks), lambda: attend(start=0))


def _attend_stored(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    *,
    start: int,
    stop: Int32[Array, "batch tokens"],
    transform: PreparedTransform | None,
    shard: SequenceShard | None = None,
) -> Partial:
    """Attention to the stored tokens `start <= n < stop`, as the store numbers them."""
    spec = cache.spec
    if spec.evict:
        empty = jnp.zeros(query.shape, jnp.float32)
        return Partial(empty, jnp.full(query.shape[:-1], -jnp.inf))
    packed = None
    if spec.values is not None:
        assert cache.value_words is not None and cache.value_affine is not None
        packed = PackedValues(cache.value_words, cache.value_affine, spec.values.bits)
    if spec.exact:
        assert cache.keys is not None and cache.values is not None
        return exact_attention(
            query, cache.keys, cache.values, layer, dtype=cache.dtype, start=start, stop=stop
        )
    if spec.keys is None:
        assert cache.keys is not None
        scores = exact_scores(cache.keys, cache.dtype, layer, query)
        return _attend_blocks(cache, layer, query, scores, packed, start, stop)
    if isinstance(spec.keys, ChannelQuantisedKeys):
        assert cache.key_words is not None and cache.key_groups is not None
        scores = channel_scores(spec.keys, cache.key_words, cache.key_groups, layer, query)
        return _attend_blocks(cache, layer, query, scores, packed, start, stop)
    assert parameters is not None and cache.key_words is not None
    scoring, shift = sketch_query(spec, spec.keys, parameters, query, frequencies)
    scoring = replace(scoring, prepared=transform)
    if shard is not None and scoring.rope is not None:
        # Blocks that follow each other in the store are several blocks apart.
        spread = replace(scoring.rope, frequencies=shard.block_frequencies(frequencies))
        vectors = rotate(scoring.vectors, -shard.offset, frequencies)
        scoring = replace(scoring, vectors=vectors, rope=spread)
    keys = PackedKeys(cache.key_words, cache.key_scales)
    # The kernel takes values with one scale and zero for the whole head.
    if packed is not None and packed.affine.shape[2] == cache.kv_heads:
        found = sketch_attention(scoring, keys, packed, layer, start=start, stop=stop)
    else:
        scores = sketch_scores(scoring, keys, layer)
        found = _attend_blocks(cache, layer, query, scores, packed, start, stop)
    return Partial(found.output, found.lse + shift)


def _attend_blocks(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    scores: BlockScores,
    packed: PackedValues | None,
    start: int,
    stop: Int32[Array, "batch tokens"],
) -> Partial:
    """Combinations of stored keys and values that have no kernel."""
    if packed is not None:
        values = packed_values(packed, layer, cache.head_dim)
    else:
        assert cache.values is not None
        values = exact_vectors(cache.values, cache.dtype, layer, cache.head_dim)
    return attend_blocks(
        scores,
        values,
        start=start,
        stop=stop,
        capacity=cache.capacity,
        kv_heads=cache.kv_heads,
        query_shape=query.shape,
    )


def _attend_window(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    positions: Int32[Array, "batch tokens"],
) -> Partial:
    """Attention to what the window holds, of which a query sees all or nothing of a token."""
    assert cache.window_keys is not None and cache.window_values is not None
    slots = cache.window_keys.shape[2]
    if query.shape[1] == 1 and choose(query, cache.window_keys, jnp.bfloat16).implementation != (
        "xla"
    ):
        # The window holds just what its latest token sees; slots are filled in order.
        return exact_attention(
            query,
            cache.window_keys,
            cache.window_values,
            layer,
            dtype=jnp.bfloat16,
            start=0,
            stop=jnp.minimum(positions + 1, slots),
        )
    held = window_positions(cache)
    visible = _causal(positions, held) & is_exact(cache, positions, held)
    return _attend_vectors(query, *read_window(cache, layer), visible)


def _attend_chunk(
    cache: KVCache,
    layer: Int32[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    exact_chunk: bool,
) -> Partial:
    """Exact attention to the chunk itself, and to the window as it was before the chunk."""
    visible = _causal(positions, positions)
    if not exact_chunk:
        visible &= is_exact(cache, positions, positions)
        keys, values = as_window(keys), as_window(values)
    found = _attend_vectors(query, keys, values, visible)
    if not cache.spec.window:
        return found
    return merge(found, _attend_window(cache, layer, query, positions))


def _attend_vectors(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Float[Array, "batch keys kv_heads head_dim"],
    values: Float[Array, "batch keys kv_heads head_dim"],
    visible: Bool[Array, "batch queries keys"],
) -> Partial:
    logits = exact_logits(query, jnp.moveaxis(keys, 2, 1))
    return heads_last(softmax_partial(logits, visible[:, None, None], jnp.moveaxis(values, 2, 1)))


def _causal(
    query: Int32[Array, "batch queries"], key: Int32[Array, "batch keys"]
) -> Bool[Array, "batch queries keys"]:
    return (key[:, None] >= 0) & (key[:, None] <= query[..., None])
