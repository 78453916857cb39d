"""Writing new tokens into the stored part of a cache."""

from dataclasses import replace

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from h1bjax.cache.channel_keys import ChannelQuantisedKeys
from h1bjax.cache.keys import CodecParameters
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.scoring import encode_keys, relative_keys
from h1bjax.cache.sequence_shard import SequenceShard
from h1bjax.cache.spec import CacheSpec
from h1bjax.cache.window import as_window, recent_keys
from pallas_kernels.append import ExactWindow, KeyEncoder, StoredTokens, Token, append_token
from pallas_kernels.packing import pack_column, pack_scalar_pair, scalar_index, to_storage
from pallas_kernels.sketch_attention import PackedKeys, PackedValues


def append(
    cache: KVCache,
    layer: Int32[Array, ""],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
    shard: SequenceShard | None = None,
) -> KVCache:
    """Encodes a chunk and writes it at its positions in one layer; the window is not touched.

    Positions of -1 are not written. Lengths advance once, after all layers (`KVCache.advance`).
    The window may hold the chunk already where that is a single token. A shard writes its own
    tokens only.
    """
    spec = cache.spec
    if spec.evict:
        return cache
    row = jnp.arange(cache.batch)[:, None]
    # Scatters drop what lies beyond the capacity; a negative index would wrap around instead.
    place = positions if shard is None else shard.place(positions)
    position = jnp.where(place < 0, cache.capacity, place)

    def write_tokens(array: Array | None, chunk: Array) -> Array:
        assert array is not None
        stored = to_storage(chunk.astype(cache.dtype))
        return array.at[layer, row, position].set(stored, mode="drop")

    def write_columns(array: Array | None, columns: Array) -> Array:
        assert array is not None
        return array.at[layer, row, :, position].set(columns, mode="drop")

    if isinstance(spec.keys, ChannelQuantisedKeys):
        cache = _append_key_groups(cache, spec.keys, layer, keys, positions, shard)
    elif spec.keys is None:
        cache = replace(cache, keys=write_tokens(cache.keys, _channels(keys)))
    else:
        assert parameters is not None
        encoded = encode_keys(spec, spec.keys, parameters, keys, positions, frequencies)
        words = _channels(pack_column(encoded.bits, 1))
        cache = replace(cache, key_words=write_columns(cache.key_words, words))
        if encoded.scale is not None:
            assert cache.key_scales is not None
            half, column = scalar_index(position, cache.capacity)
            pairs = rearrange(cache.key_scales, "l b (k half) t -> l b k half t", half=2)
            pairs = pairs.at[layer, row, :, half, column].set(
                to_storage(encoded.scale), mode="drop"
            )
            cache = replace(cache, key_scales=pairs.reshape(cache.key_scales.shape))
    if spec.values is None:
        return replace(cache, values=write_tokens(cache.values, _channels(values)))
    codes, scale, zero = spec.values.encode(values)
    words = _channels(pack_column(codes, spec.values.bits))
    return replace(
        cache,
        value_words=write_columns(cache.value_words, words),
        value_affine=write_columns(cache.value_affine, _channels(pack_scalar_pair(scale, zero))),
    )


def appends_in_one_step(spec: CacheSpec, head_dim: int) -> bool:
    """Whether `append_one` takes caches of this spec: of sketches, and values with one scale."""
    values = spec.values
    return spec.sketch is not None and values is not None and values.groups(head_dim) == 1


def append_one(
    cache: KVCache,
    layer: Int32[Array, ""],
    keys: Float[Array, "batch 1 kv_heads head_dim"],
    values: Float[Array, "batch 1 kv_heads head_dim"],
    positions: Int32[Array, "batch 1"],
    encoder: KeyEncoder,
    frequencies: Float[Array, "half_dim"],
    shard: SequenceShard | None = None,
) -> KVCache:
    """Writes one token of each row into one layer's store and window, in one step and in place.

    Args:
        cache: one that `appends_in_one_step`.
        layer: which layer.
        keys: after RoPE.
        values: of the same tokens.
        positions: nothing is written at -1.
        encoder: of all layers.
        frequencies: RoPE frequencies, radians per token.
        shard: writes its own tokens only, and leaves the window alone.
    """
    spec = cache.spec
    place = positions if shard is None else shard.place(positions)
    assert cache.key_words is not None and spec.values is not None
    assert cache.value_words is not None and cache.value_affine is not None
    window = None
    if cache.window_keys is not None and shard is None:
        assert cache.window_values is not None
        window = ExactWindow(cache.window_keys, cache.window_values, spec.sinks)
    relative = None
    if spec.rope_period is not None:
        relative = relative_keys(keys, positions, spec.rope_period, frequencies)[:, 0]
    stored = append_token(
        StoredTokens(
            PackedKeys(cache.key_words, cache.key_scales),
            PackedValues(cache.value_words, cache.value_affine, spec.values.bits),
            window,
        ),
        layer,
        encoder,
        Token(keys[:, 0], values[:, 0], place[:, 0], relative),
    )
    cache = replace(
        cache,
        key_words=stored.keys.words,
        key_scales=stored.keys.scales,
        value_words=stored.values.words,
        value_affine=stored.values.affine,
    )
    if stored.window is None:
        return cache
    return replace(cache, window_keys=stored.window.keys, window_values=stored.window.values)


def _append_key_groups(
    cache: KVCache,
    codec: ChannelQuantisedKeys,
    layer: Int32[Array, ""],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    shard: SequenceShard | None,
) -> KVCache:
    """Quantises and writes the groups of keys that the chunk completes."""
    assert cache.key_words is not None and cache.key_groups is not None
    group = codec.group
    length = cache.lengths[:, None]
    # A chunk completes at most this many groups, of which the first may begin before it.
    groups = (positions.shape[1] + group - 1) // group
    position = length - length % group + jnp.arange(groups * group)
    known = jnp.concatenate([recent_keys(cache, layer, group - 1), as_window(keys)], axis=1)
    index = position - length + group - 1
    members = jnp.take_along_axis(known, index[..., None, None], axis=1, mode="clip")
    encoded = codec.encode(rearrange(members, "b (g n) k d -> b g n k d", n=group))

    # Scatters drop what lies beyond the capacity, which incomplete groups are sent to.
    end = cache.advance(positions).lengths[:, None]
    place = position if shard is None else shard.place(position)
    column = jnp.where((position < end - end % group) & (place >= 0), place, cache.capacity)
    words = rearrange(pack_column(encoded.codes, codec.bits), "b g n k w -> b (g n) (k w)")
    row = jnp.arange(cache.batch)[:, None]
    return replace(
        cache,
        key_words=cache.key_words.at[layer, row, :, column].set(words, mode="drop"),
        key_groups=cache.key_groups.at[layer, row, :, column[:, ::group] // group].set(
            encoded.scalars, mode="drop"
        ),
    )


def _channels(
    per_head: Float[Array, "batch tokens kv_heads channels"],
) -> Float[Array, "batch tokens all_channels"]:
    return rearrange(per_head, "b t k c -> b t (k c)")
