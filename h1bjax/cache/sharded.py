"""Attention on a mesh: every device has its rows, its KV heads and its tokens."""

from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from h1bjax.cache.attend import append_and_attend
from h1bjax.cache.keys import CodecParameters
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.prepared import PreparedCodec
from h1bjax.cache.sequence_shard import SequenceShard
from h1bjax.cache.spec import CacheSpec
from h1bjax.config import LlamaConfig
from h1bjax.sharding import BATCH, SEQUENCE, TENSOR

_BY_HEADS = PartitionSpec(TENSOR)
_STACKED_BY_HEADS = PartitionSpec(None, TENSOR)
_TOKENS = PartitionSpec(BATCH, None, TENSOR, None)
_TOKENS_LAST = PartitionSpec(None, BATCH, TENSOR, SEQUENCE)
_CHANNELS_LAST = PartitionSpec(None, BATCH, SEQUENCE, TENSOR)
_FIELDS = {
    "key_words": _TOKENS_LAST,
    "key_scales": _TOKENS_LAST,
    "key_groups": _TOKENS_LAST,
    "keys": _CHANNELS_LAST,
    "value_words": _TOKENS_LAST,
    "value_affine": _TOKENS_LAST,
    "values": _CHANNELS_LAST,
    # Every shard of a row's tokens holds all of its window.
    "window_keys": PartitionSpec(None, BATCH, None, TENSOR),
    "window_values": PartitionSpec(None, BATCH, None, TENSOR),
    "lengths": PartitionSpec(BATCH),
}


def cache_specs(cache: KVCache) -> KVCache:
    """A cache with the partition of each array in its place."""
    present: dict[str, Any] = {
        item.name: _FIELDS[item.name]
        for item in fields(cache)
        if item.name in _FIELDS and getattr(cache, item.name) is not None
    }
    return replace(cache, **present)


def sharded_shapes(
    mesh: Mesh, config: LlamaConfig, spec: CacheSpec, *, batch: int, max_length: int, dtype: Any
) -> KVCache:
    """The shapes of `KVCache.init` on a mesh, which say where their parts lie.

    Raises:
        ValueError: `batch` is no multiple of the mesh's; otherwise as `KVCache.init`.
    """
    if batch % mesh.shape[BATCH]:
        raise ValueError(f"{batch} rows cannot be divided over batch={mesh.shape[BATCH]}")
    init = _init(mesh, config, spec, batch=batch, max_length=max_length, dtype=dtype)
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda shape, axes: shape.update(sharding=NamedSharding(mesh, axes)),
        shapes,
        cache_specs(shapes),
    )


def init_sharded(
    mesh: Mesh, config: LlamaConfig, spec: CacheSpec, *, batch: int, max_length: int, dtype: Any
) -> KVCache:
    """`KVCache.init` on a mesh: each device allocates its own part. Raises as `sharded_shapes`."""
    sizes: dict[str, Any] = {"batch": batch, "max_length": max_length, "dtype": dtype}
    shapes = sharded_shapes(mesh, config, spec, **sizes)
    places = jax.tree.map(lambda shape: shape.sharding, shapes)
    return jax.jit(_init(mesh, config, spec, **sizes), out_shardings=places)()


def _init(mesh: Mesh, config: LlamaConfig, spec: CacheSpec, **sizes: Any) -> partial[KVCache]:
    return partial(KVCache.init, config, spec, sequence_shards=mesh.shape[SEQUENCE], **sizes)


def sharded_append_and_attend(
    mesh: Mesh,
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
) -> tuple[Float[Array, "batch tokens heads head_dim"], KVCache]:
    """`append_and_attend` on a mesh; its kernels see the local shard alone."""
    count = mesh.shape[SEQUENCE]
    specs = cache_specs(cache)

    def local(
        cache: KVCache,
        layer: Array,
        query: Array,
        keys: Array,
        values: Array,
        positions: Array,
        parameters: CodecParameters | None,
        frequencies: Array,
        prepared: PreparedCodec | None,
    ) -> tuple[Array, KVCache]:
        capacity = cache.capacity
        shard = None if count == 1 else SequenceShard.here(SEQUENCE, count, cache.spec)
        output, updated = append_and_attend(
            replace(cache, capacity=capacity // count, sequence_shards=1),
            layer,
            query,
            keys,
            values,
            positions,
            parameters,
            frequencies,
            exact_chunk=exact_chunk,
            # A prompt that fills shards of a row is read back in blocks.
            fresh=fresh and shard is None,
            prepared=prepared,
            shard=shard,
        )
        return output, replace(updated, capacity=capacity, sequence_shards=count)

    by_heads = jax.tree.map(lambda _: _BY_HEADS, parameters)
    stacked = jax.tree.map(lambda _: _STACKED_BY_HEADS, prepared)
    nowhere = PartitionSpec()
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            specs,
            nowhere,
            _TOKENS,
            _TOKENS,
            _TOKENS,
            PartitionSpec(BATCH),
            by_heads,
            nowhere,
            stacked,
        ),
        out_specs=(_TOKENS, specs),
        # Kernels do not say over which axes what they write varies.
        check_vma=False,
    )
    return run(cache, layer, query, keys, values, positions, parameters, frequencies, prepared)
