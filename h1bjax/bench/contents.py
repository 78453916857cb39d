"""Random weights and random caches: what a model computes does not change how fast it does."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from zlib import crc32

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from h1bjax.cache import CacheSpec, KVCache
from h1bjax.config import LlamaConfig
from h1bjax.parameters import decoder_parameters
from pallas_kernels.packing import pack_scalar_pair, to_storage

Draw = Callable[[Key[Array, ""], tuple[int, ...]], Array]


def random_parameters(
    config: LlamaConfig, dtype: DTypeLike, rng: Key[Array, ""]
) -> dict[str, Array]:
    """Parameters of a decoder, scaled so that activations keep their size.

    They are drawn in their own dtype and layer by layer, so that hardly more memory is needed than
    they occupy.
    """

    def matrix(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
        return config.hidden_size**-0.5 * jax.random.normal(rng, shape, dtype)

    def norm(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
        return jnp.ones(shape, dtype)

    return {
        name: _drawn(
            _named(rng, name),
            norm if name.endswith("norm") else matrix,
            (config.num_layers,) if info.stacked else (),
            info.shape,
        )
        for name, info in decoder_parameters(config).items()
    }


def random_cache(
    config: LlamaConfig,
    spec: CacheSpec,
    *,
    batch: int,
    max_length: int,
    dtype: DTypeLike,
    rng: Key[Array, ""],
) -> KVCache:
    """A cache full of random codes, with scales as they could be, and lengths of 0.

    Drawn row by row of the batch: nothing is needed beside the cache itself.
    """
    shapes = jax.eval_shape(
        partial(KVCache.init, config, spec, batch=batch, max_length=max_length, dtype=dtype)
    )
    arrays = {
        field.name: getattr(shapes, field.name)
        for field in fields(shapes)
        if isinstance(getattr(shapes, field.name), jax.ShapeDtypeStruct)
    }
    return replace(
        shapes,
        **{
            name: jnp.zeros(array.shape, array.dtype)
            if array.ndim < 3
            else _drawn(
                _named(rng, name), _contents(name, shapes.dtype), array.shape[:2], array.shape[2:]
            )
            for name, array in arrays.items()
        },
    )


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


@partial(jax.jit, static_argnames=("draw", "outer", "inner"))
def _drawn(
    rng: Key[Array, ""], draw: Draw, outer: tuple[int, ...], inner: tuple[int, ...]
) -> Array:
    """An array of shape `outer + inner`, drawn one element of `outer` at a time."""
    rngs = jax.random.split(rng, outer).reshape(-1)
    parts = jax.lax.map(lambda rng: draw(rng, inner), rngs)
    return parts.reshape(*outer, *inner)


def _named(rng: Key[Array, ""], name: str) -> Key[Array, ""]:
    return jax.random.fold_in(rng, crc32(name.encode()))
