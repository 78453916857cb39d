"""Writing whole prompts into an empty cache, each array by one contiguous slice."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, Shaped

from h1bjax.cache.channel_keys import ChannelQuantisedKeys, EncodedKeyGroups
from h1bjax.cache.keys import CodecParameters, EncodedKeys
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.scoring import encode_keys
from h1bjax.cache.spec import CacheSpec
from h1bjax.cache.values import EncodedValues
from h1bjax.cache.window import as_window, window_positions
from pallas_kernels.packing import (
    TOKEN_BLOCK,
    pack_column,
    pack_scalar_pair,
    pack_scalars,
    to_storage,
)


class EncodedChunk(NamedTuple):
    """What a cache stores of some tokens, before packing.

    Attributes:
        keys: None where they are stored exactly or not at all. Groups of keys begin at the first
            token, the last one is filled up with zeros.
        values: None where they are stored exactly or not at all.
    """

    keys: EncodedKeys | EncodedKeyGroups | None
    values: EncodedValues | None


def encode_chunk(
    spec: CacheSpec,
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    parameters: CodecParameters | None,
    frequencies: Float[Array, "half_dim"],
) -> EncodedChunk:
    """Encodes the tokens of rows that begin at position 0; padding becomes anything."""
    encoded_keys: EncodedKeys | EncodedKeyGroups | None = None
    if isinstance(spec.keys, ChannelQuantisedKeys):
        group = spec.keys.group
        whole = jnp.pad(as_window(keys), ((0, 0), (0, -keys.shape[1] % group), (0, 0), (0, 0)))
        encoded_keys = spec.keys.encode(rearrange(whole, "b (g n) k d -> b g n k d", n=group))
    elif spec.keys is not None:
        assert parameters is not None
        encoded_keys = encode_keys(spec, spec.keys, parameters, keys, positions, frequencies)
    return EncodedChunk(encoded_keys, None if spec.values is None else spec.values.encode(values))


def fill(
    cache: KVCache,
    layer: Int32[Array, ""],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    encoded: EncodedChunk,
) -> KVCache:
    """Writes the first tokens of all rows into one layer, the window included.

    Where a row has padding, zeros are written. Lengths advance once, after all layers
    (`KVCache.advance`).

    Args:
        cache: holds no tokens.
        layer: which layer of the cache.
        keys: after RoPE.
        values: of the same tokens.
        positions: 0, 1, 2, … in each row, then -1 for padding.
        encoded: the same tokens, encoded.
    """
    spec = cache.spec
    # Whatever does not fit is padding.
    valid = positions[:, : cache.capacity] >= 0
    width = valid.shape[1]

    def write(
        array: Shaped[Array, "layers batch first second"] | None,
        part: Shaped[Array, "batch some others"],
    ) -> Array:
        assert array is not None
        return jax.lax.dynamic_update_slice(array, part[None], (layer, 0, 0, 0))

    def tokens_first(chunk: Array) -> Array:
        return _valid(_channels(to_storage(chunk.astype(cache.dtype)))[:, :width], valid)

    def tokens_last(per_head: Array, valid: Array = valid) -> Array:
        channels = _channels(per_head)[:, : valid.shape[1]]
        return rearrange(_valid(channels, valid), "b t c -> b c t")

    if isinstance(encoded.keys, EncodedKeyGroups):
        assert isinstance(spec.keys, ChannelQuantisedKeys)
        group = spec.keys.group
        # A group is stored once its last token is there.
        complete = jnp.pad(valid, ((0, 0), (0, -width % group)))[:, group - 1 :: group]
        stored = jnp.repeat(complete, group, axis=1)[:, :width]
        codes = rearrange(encoded.keys.codes, "b g n k d -> b (g n) k d")
        cache = replace(
            cache,
            key_words=write(
                cache.key_words, tokens_last(pack_column(codes, spec.keys.bits), stored)
            ),
            key_groups=write(
                cache.key_groups,
                rearrange(
                    _valid(encoded.keys.scalars[:, : complete.shape[1]], complete), "b g c -> b c g"
                ),
            ),
        )
    elif encoded.keys is not None:
        words = tokens_last(pack_column(encoded.keys.bits, 1))
        cache = replace(cache, key_words=write(cache.key_words, words))
        if encoded.keys.scale is not None:
            scale = jnp.pad(
                _valid(encoded.keys.scale[:, :width], valid),
                ((0, 0), (0, -width % TOKEN_BLOCK), (0, 0)),
            )
            pairs = pack_scalars(rearrange(scale, "b t k -> b k t"))
            cache = replace(cache, key_scales=write(cache.key_scales, pairs))
    elif not spec.evict:
        cache = replace(cache, keys=write(cache.keys, tokens_first(keys)))

    if encoded.values is not None:
        assert spec.values is not None
        words = tokens_last(pack_column(encoded.values.codes, spec.values.bits))
        affine = tokens_last(pack_scalar_pair(encoded.values.scale, encoded.values.zero))
        cache = replace(
            cache,
            value_words=write(cache.value_words, words),
            value_affine=write(cache.value_affine, affine),
        )
    elif not spec.evict:
        cache = replace(cache, values=write(cache.values, tokens_first(values)))

    if spec.window:
        held = window_positions(cache.advance(positions))
        cache = replace(
            cache,
            window_keys=write(cache.window_keys, _window(keys, held)),
            window_values=write(cache.window_values, _window(values, held)),
        )
    return cache


def _window(
    chunk: Float[Array, "batch tokens kv_heads head_dim"], held: Int32[Array, "batch window"]
) -> Shaped[Array, "batch window channels"]:
    tokens = jnp.take_along_axis(as_window(chunk), held[..., None, None], axis=1, mode="clip")
    return _valid(_channels(to_storage(tokens)), held >= 0)


def _valid(
    channels: Shaped[Array, "batch tokens channels"], valid: Bool[Array, "batch tokens"]
) -> Shaped[Array, "batch tokens channels"]:
    return jnp.where(valid[..., None], channels, jnp.zeros((), channels.dtype))


def _channels(
    per_head: Shaped[Array, "batch tokens kv_heads channels"],
) -> Shaped[Array, "batch tokens all_channels"]:
    return rearrange(per_head, "b t k c -> b t (k c)")
