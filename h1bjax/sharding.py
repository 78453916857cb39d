"""One mesh for everything: which axes it has, and what lies where on it.

A mesh has three axes. `batch` divides the rows of a batch. `tensor` divides heads with their keys
and values. `sequence` divides the tokens of every row, whose attention is then merged. What has no
tokens, such as the hidden layer of the MLP and the vocabulary, is divided over both of the latter.
Weights name their own axes (`h1bjax.parameters`), and `parameter_sharding` says over which of the
mesh's each is divided; XLA does the rest, except for attention, which runs on local shards
(`h1bjax.cache.sharded`).
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from h1bjax.checkpoint import ShardingRule
from h1bjax.config import LlamaConfig

BATCH, TENSOR, SEQUENCE = AXES = ("batch", "tensor", "sequence")

_BOTH = ((TENSOR, SEQUENCE), (TENSOR,))
# Over which axes of the mesh an axis of a weight may be divided, the best first.
_DIVISIONS = {"heads": _BOTH, "kv_heads": ((TENSOR,),), "mlp": _BOTH, "vocab": _BOTH}

_Tree = TypeVar("_Tree")


def make_mesh(sizes: Mapping[str, int] | str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the three axes.

    Args:
        sizes: devices along each axis, 1 where it is absent; or the same as text, such as
            "batch=2,tensor=4".
        devices: as many as the sizes multiply to; by default all that there are, of all processes.

    Raises:
        ValueError: an axis is unknown, a size is not positive, or the devices are not so many.
    """
    if isinstance(sizes, str):
        sizes = parse_sizes(sizes)
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise ValueError(f"a mesh has the axes {', '.join(AXES)}, not {', '.join(unknown)}")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if min(shape) < 1:
        raise ValueError(f"the sizes of a mesh must be positive: {dict(sizes)}")
    available = jax.devices() if devices is None else devices
    if prod(shape) != len(available):
        raise ValueError(
            f"a mesh of {_named(shape)} has {prod(shape)} devices, and there are {len(available)}"
        )
    return Mesh(np.asarray(available).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def parse_sizes(text: str) -> dict[str, int]:
    """Sizes of a mesh from text such as "batch=2,tensor=4".

    Raises:
        ValueError: the text is not written so.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not equals or not size.isdecimal() or name in sizes:
            raise ValueError(
                f"a mesh is written like batch=2,tensor=4, each axis once, and not {text!r}"
            )
        sizes[name] = int(size)
    return sizes


def _named(shape: Sequence[int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))


def check_mesh(mesh: Mesh, config: LlamaConfig) -> None:
    """Raises ValueError if the mesh is not of `make_mesh`, or cannot divide the model's heads."""
    if mesh.axis_names != AXES:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, not {AXES}; make it with make_mesh"
        )
    tensor, heads = mesh.shape[TENSOR], config.num_kv_heads
    if heads % tensor:
        fitting = [size for size in range(1, tensor) if heads % size == 0 and tensor % size == 0]
        raise ValueError(
            f"tensor={tensor} does not divide the model's {heads} KV heads; use "
            f"tensor={fitting[-1]}, and give the other devices to batch or sequence"
        )


def parameter_sharding(mesh: Mesh, config: LlamaConfig) -> ShardingRule:
    """Where parameters go; an axis whose size cannot be divided is replicated."""
    sizes = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
    }

    def divided(axis: str | None) -> tuple[str, ...] | None:
        for names in _DIVISIONS.get(axis or "", ()):
            if sizes[axis or ""] % prod(mesh.shape[name] for name in names) == 0:
                return names
        return None

    def rule(axes: tuple[str | None, ...]) -> NamedSharding:
        return _placement(mesh, [divided(axis) for axis in axes])

    return rule


def _placement(mesh: Mesh, axes: Sequence[tuple[str, ...] | None]) -> NamedSharding:
    """Where an array lies whose axes are divided over these of the mesh's, in XLA's own words.

    It names no axis of size 1, and no None last. What a jitted function returned lies so; were its
    argument said to lie there in other words, it would be compiled again.
    """
    named = [tuple(name for name in names or () if mesh.shape[name] > 1) or None for names in axes]
    while named and named[-1] is None:
        named.pop()
    return NamedSharding(mesh, PartitionSpec(*named))


def put(array: Array | np.ndarray, where: Sharding) -> Array:
    """An array where it belongs; one that is not divided yet must be the same in all processes."""
    divided = isinstance(array, jax.Array) and not array.is_fully_addressable
    if where.is_fully_addressable or divided:
        return jax.device_put(array, where)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)


def place_by_heads(mesh: Mesh | None, stacked: _Tree) -> _Tree:
    """Arrays `[layers, heads or kv_heads, ...]`, divided by heads; as they are without a mesh."""
    if mesh is None:
        return stacked
    place = NamedSharding(mesh, PartitionSpec(None, TENSOR))
    return jax.tree.map(lambda array: put(array, place), stacked)


def place_rows(mesh: Mesh | None, tree: _Tree) -> _Tree:
    """Arrays `[batch, ...]` divided by rows, and scalars everywhere; as they are without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda array: put(array, _placement(mesh, [(BATCH,)][: array.ndim])), tree)


def spread_rows(mesh: Mesh | None, x: Array) -> Array:
    """Asks XLA to divide the rows of activations `[batch, ...]`, and to replicate the rest."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH)))


def padded_rows(mesh: Mesh | None, rows: int) -> int:
    """`rows`, rounded up to a multiple of the mesh's `batch`."""
    if mesh is None:
        return rows
    return -(-rows // mesh.shape[BATCH]) * mesh.shape[BATCH]


def to_host(array: Array) -> np.ndarray:
    """The whole array, also where other processes hold parts of it; all of them must call this."""
    if not array.is_fully_addressable:
        mesh = array.sharding.mesh  # type: ignore[attr-defined]
        everywhere = NamedSharding(mesh, PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=everywhere)(array)
    return np.asarray(array)
