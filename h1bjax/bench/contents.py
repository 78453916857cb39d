"""Random weights and random caches: what a model computes does not change how fast it does."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from math import prod
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from h1bjax.bench.placement import cache_shapes
from h1bjax.cache import CacheSpec, KVCache
from h1bjax.config import LlamaConfig
from h1bjax.parameters import ParameterInfo, decoder_parameters
from h1bjax.sharding import parameter_sharding
from pallas_kernels.packing import pack_scalar_pair, to_storage

Draw = Callable[[Key[Array, ""], tuple[int, ...]], Array]


def random_parameters(
    config: LlamaConfig, dtype: DTypeLike, rng: Key[Array, ""], mesh: Mesh | None = None
) -> dict[str, Array]:
    """Parameters of a decoder, scaled so that activations keep their size.

    They are drawn in their own dtype and layer by layer, so that hardly more memory is needed than
    they occupy; on a mesh each device draws its own part.
    """
    rule = None if mesh is None else parameter_sharding(mesh, config)

    def matrix(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
        return config.hidden_size**-0.5 * jax.random.normal(rng, shape, dtype)

    def norm(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
        return jnp.ones(shape, dtype)

    def draw(name: str, info: ParameterInfo) -> Array:
        layers, axis = ((config.num_layers,), (None,)) if info.stacked else ((), ())
        return _drawn(
            _named(rng, name),
            norm if name.endswith("norm") else matrix,
            (*layers, *info.shape),
            len(layers),
            None if rule is None else rule((*axis, *info.axes)),
        )

    return {name: draw(name, info) for name, info in decoder_parameters(config).items()}


def random_cache(
    config: LlamaConfig,
    spec: CacheSpec,
    *,
    batch: int,
    max_length: int,
    dtype: DTypeLike,
    rng: Key[Array, ""],
    mesh: Mesh | None = None,
) -> KVCache:
    """A cache full of random codes, with scales as they could be, and lengths of 0.

    Drawn row by row of the batch, and on a mesh by each device for itself: nothing is needed beside
    the cache itself.
    """
    shapes = cache_shapes(config, spec, mesh, batch=batch, max_length=max_length, dtype=dtype)
    drawn: dict[str, Any] = {}
    for field in fields(shapes):
        array = getattr(shapes, field.name)
        if not isinstance(array, jax.ShapeDtypeStruct):
            continue
        place: Any = array.sharding
        if array.ndim < 3:
            drawn[field.name] = jnp.zeros(array.shape, array.dtype, device=place)
            continue
        contents = _contents(field.name, shapes.dtype)
        drawn[field.name] = _drawn(_named(rng, field.name), contents, array.shape, 2, place)
    return replace(shapes, **drawn)


def _contents(field: str, dtype: jnp.dtype) -> Draw:
    """How one row's part of a field of `KVCache` is drawn."""
    draws: dict[str, Draw] = {
        "key_words": _words,
        "key_scales": _scales,
        "key_groups": _affine,
        "keys": partial(_vectors, dtype=dtype),
        "value_words": _words,
        "value_affine": _affine,
        "values": partial(_vectors, dtype=dtype),
        "window_keys": partial(_vectors, dtype=jnp.bfloat16),
        "window_values": partial(_vectors, dtype=jnp.bfloat16),
    }
    return draws[field]


def _words(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(rng, shape), jnp.int32)


def _scales(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    return to_storage(jax.random.uniform(rng, shape, jnp.bfloat16, 0.5, 1.5))


def _affine(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    scale = jax.random.uniform(rng, shape, jnp.bfloat16, 0.1, 0.3)
    return pack_scalar_pair(scale, -scale)


def _vectors(rng: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return to_storage(jax.random.normal(rng, shape, dtype))


@partial(jax.jit, static_argnames=("draw", "shape", "outer", "place"))
def _drawn(
    rng: Key[Array, ""],
    draw: Draw,
    shape: tuple[int, ...],
    outer: int,
    place: NamedSharding | None,
) -> Array:
    """An array, drawn one element of its first `outer` axes at a time.

    Left to XLA, a division of these axes would not survive that they are drawn as one: devices draw
    under `shard_map`, each from a number of its own unless they hold the same.
    """
    if place is None:
        return _part_drawn(rng, draw, shape, outer)
    axes = [name for names in place.spec for name in _tuple(names)]

    def part(rng: Key[Array, ""]) -> Array:
        for axis in axes:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
        return _part_drawn(rng, draw, place.shard_shape(shape), outer)

    nowhere = PartitionSpec()
    run = jax.shard_map(
        part, mesh=place.mesh, in_specs=nowhere, out_specs=place.spec, check_vma=False
    )
    return run(rng)


def _part_drawn(rng: Key[Array, ""], draw: Draw, shape: tuple[int, ...], outer: int) -> Array:
    rngs = jax.random.split(rng, prod(shape[:outer]))
    return jax.lax.map(lambda rng: draw(rng, shape[outer:]), rngs).reshape(shape)


def _tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a mesh that divide one axis of an array."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def _named(rng: Key[Array, ""], name: str) -> Key[Array, ""]:
    return jax.random.fold_in(rng, crc32(name.encode()))
