"""The exact window: the first S tokens, and a ring of the latest W."""

from dataclasses import replace

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, BFloat16, Bool, Float, Int32, UInt16

from h1bjax.cache.kv_cache import KVCache
from pallas_kernels.packing import from_storage, to_storage


def window_positions(cache: KVCache) -> Int32[Array, "batch window"]:
    """The position of the token in each slot, -1 where a slot is empty."""
    sinks, window = cache.spec.sinks, cache.spec.window
    length = cache.lengths[:, None]
    sink = jnp.arange(sinks, dtype=jnp.int32)
    first = sinks + jnp.arange(window, dtype=jnp.int32)
    # The latest n < length with n ≡ first (mod W): whole turns of the ring after the first.
    turns = (length - 1 - first) // max(window, 1)
    ring = jnp.where(turns >= 0, first + window * turns, -1)
    return jnp.concatenate([jnp.where(sink < length, sink, -1), ring], axis=1)


def is_exact(
    cache: KVCache, query: Int32[Array, "batch queries"], key: Int32[Array, "batch keys"]
) -> Bool[Array, "batch queries keys"]:
    """Whether a query at one position reads the key at another exactly: n < S or n > t - W."""
    t, n = query[:, :, None], key[:, None, :]
    return (n < cache.spec.sinks) | (n > t - cache.spec.window)


def as_window(
    x: Float[Array, "batch tokens kv_heads head_dim"],
) -> BFloat16[Array, "batch tokens kv_heads head_dim"]:
    """What a token's keys or values read as once they lie in the window."""
    return x.astype(jnp.bfloat16)


def read_window(
    cache: KVCache, layer: Int32[Array, ""]
) -> tuple[
    BFloat16[Array, "batch window kv_heads head_dim"],
    BFloat16[Array, "batch window kv_heads head_dim"],
]:
    """The keys and values of one layer's window, slot by slot."""
    assert cache.window_keys is not None and cache.window_values is not None
    keys, values = (
        rearrange(
            from_storage(array[layer], jnp.bfloat16), "b s (k d) -> b s k d", d=cache.head_dim
        )
        for array in (cache.window_keys, cache.window_values)
    )
    return keys, values


def recent_keys(
    cache: KVCache, layer: Int32[Array, ""], count: int
) -> BFloat16[Array, "batch count kv_heads head_dim"]:
    """Keys of each row's latest `count <= W` tokens; arbitrary where a row holds fewer."""
    assert cache.window_keys is not None
    position = jnp.maximum(cache.lengths[:, None] + jnp.arange(-count, 0), 0)
    row = jnp.arange(cache.batch)[:, None]
    stored = cache.window_keys[layer, row, _slot(cache, position)]
    return rearrange(from_storage(stored, jnp.bfloat16), "b t (k d) -> b t k d", d=cache.head_dim)


def write_window(
    cache: KVCache,
    layer: Int32[Array, ""],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
) -> KVCache:
    """Writes a chunk's tokens into one layer's window, each slot at most once."""
    sinks, window = cache.spec.sinks, cache.spec.window
    end = jnp.max(positions, axis=1, keepdims=True)
    kept = (positions >= 0) & ((positions < sinks) | (positions > end - window))
    # Slots beyond the window are dropped by the scatter.
    slot = jnp.where(kept, _slot(cache, positions), sinks + window)
    row = jnp.arange(cache.batch)[:, None]

    def write(array: UInt16[Array, "layers batch window channels"], chunk: Array) -> Array:
        channels = to_storage(rearrange(as_window(chunk), "b t k d -> b t (k d)"))
        return array.at[layer, row, slot].set(channels, mode="drop")

    assert cache.window_keys is not None and cache.window_values is not None
    return replace(
        cache,
        window_keys=write(cache.window_keys, keys),
        window_values=write(cache.window_values, values),
    )


def _slot(cache: KVCache, position: Int32[Array, "batch tokens"]) -> Int32[Array, "batch tokens"]:
    sinks, window = cache.spec.sinks, cache.spec.window
    return jnp.where(position < sinks, position, sinks + (position - sinks) % window)
