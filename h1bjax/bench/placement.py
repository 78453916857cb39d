"""Where a model and its cache lie while they are measured: on one device, or over a mesh."""

from functools import partial
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from h1bjax.cache import CacheSpec, KVCache
from h1bjax.cache.sharded import sharded_shapes
from h1bjax.config import LlamaConfig
from h1bjax.sharding import BATCH, check_mesh, make_mesh, parse_sizes


def check_sizes(sizes: str, config: LlamaConfig) -> Mesh:
    """The mesh that text such as "tensor=2" describes, of numbers in the place of devices.

    So no device is asked for: it would be this process's, and its memory with it.

    Raises:
        ValueError: an axis is unknown, a size is not positive, or heads cannot be divided.
    """
    mesh = make_mesh(sizes, range(prod(parse_sizes(sizes).values())))
    check_mesh(mesh, config)
    return mesh


def check_rows(mesh: Mesh | None, batch: int) -> None:
    """Raises ValueError if the mesh cannot divide so many sequences."""
    if mesh is not None and batch % mesh.shape[BATCH]:
        raise ValueError(f"{batch} sequences cannot be divided over batch={mesh.shape[BATCH]}")


def mesh_of(sizes: str) -> Mesh:
    """The mesh that text describes, of the first devices that there are.

    Raises:
        ValueError: as `make_mesh`, or there are fewer devices.
    """
    wanted, devices = prod(parse_sizes(sizes).values()), jax.devices()
    if wanted > len(devices):
        raise ValueError(f"the mesh {sizes} needs {wanted} devices, and there are {len(devices)}")
    return make_mesh(sizes, devices[:wanted])


def cache_shapes(
    config: LlamaConfig,
    spec: CacheSpec,
    mesh: Mesh | None,
    *,
    batch: int,
    max_length: int,
    dtype: DTypeLike,
) -> KVCache:
    """The shapes of a cache, which with a mesh say where they lie, as `Decoder.init_cache` has it.

    Raises:
        ValueError: the mesh cannot divide the batch; otherwise as `KVCache.init`.
    """
    sizes: dict[str, Any] = {"batch": batch, "max_length": max_length, "dtype": dtype}
    if mesh is None:
        return jax.eval_shape(partial(KVCache.init, config, spec, **sizes))
    return sharded_shapes(mesh, config, spec, **sizes)


def shardings(tree: Any) -> Any:
    """Where the arrays or shapes of a pytree lie."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def nbytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a pytree of arrays or shapes, all of them divided evenly."""

    def held(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return prod(shape) * leaf.dtype.itemsize

    return sum(map(held, jax.tree.leaves(tree)))
