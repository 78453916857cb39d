"""Codes whose gradient is that of a smooth function beside them (arXiv 1308.3432).

The forward pass has the very codes that a cache stores. For the gradient, every quantiser is
replaced by a surrogate: its own input, cut off where its levels end. So a coded key or value
moves as the true one does, and stays where it is in directions that its code does not describe.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Shaped

from pallas_kernels.append import KeyEncoder


class SketchedKeys(NamedTuple):
    """Sketched keys as numbers, which may have gradients.

    Attributes:
        signs: ±1 in a sketch itself, float32.
        scale: the scalar of each key; None for codecs without one.
    """

    signs: Float[Array, "*tokens kv_heads bits"]
    scale: Float[Array, "*tokens kv_heads"] | None


@jax.custom_jvp
def straight_through(
    hard: Shaped[Array, "*shape"], soft: Shaped[Array, "*shape"]
) -> Shaped[Array, "*shape"]:
    """`hard`, with the gradient of `soft`."""
    return hard


@straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    hard, _ = primals
    return hard, tangents[1].astype(hard.dtype)


def with_surrogate(
    encoder: KeyEncoder,
    keys: Float[Array, "*tokens kv_heads head_dim"],
    sketched: SketchedKeys,
) -> SketchedKeys:
    """Sketches with the gradient of `surrogate_sketch`, to the keys and to the encoder.

    Args:
        encoder: of one layer.
        keys: any.
        sketched: their sketches by this encoder.
    """
    hard = jax.lax.stop_gradient(sketched)
    soft = surrogate_sketch(encoder, keys, hard.signs)
    if hard.scale is None or soft.scale is None:
        return SketchedKeys(straight_through(hard.signs, soft.signs), None)
    return SketchedKeys(
        straight_through(hard.signs, soft.signs), straight_through(hard.scale, soft.scale)
    )


def surrogate_sketch(
    encoder: KeyEncoder,
    keys: Float[Array, "*tokens kv_heads head_dim"],
    signs: Float[Array, "*tokens kv_heads bits"],
) -> SketchedKeys:
    """What sketches would be if their quantisers did not round.

    The bits behind one quantiser with n levels on either side and the place values w share its
    input x, in units of its step, as `6w/(4n² - 1)·x`, cut off at `|x| = n`. Then the level that
    they add up to is x itself, and no other way to share it changes the bits less. A plain sign
    is a quantiser with one level on either side, two planes are one with two; their step is twice
    the length `‖u‖²/(u·code)`, at which the code is as long as u along u itself.

    Products have the default precision, because nothing but a gradient depends on them.

    Args:
        encoder: of one layer.
        keys: any.
        signs: of their sketches, without which the scalar would not be that of the codes.
    """
    centred = keys.astype(jnp.float32) - encoder.mean
    u = jnp.einsum("...kd,kcd->...kc", centred, encoder.projection)
    if encoder.levels is not None:
        assert encoder.weight is not None
        soft = _shared(u, encoder.levels, encoder.weight)
    else:
        code, levels, weights = signs, 1.0, [1.0]
        if encoder.magnitude is not None:
            first, second = jnp.split(signs, 2, axis=-1)
            code, levels, weights = 2.0 * first + second, 2.0, [2.0, 1.0]
        step = 2.0 * _ratio(jnp.sum(u * u, axis=-1), jnp.sum(code * u, axis=-1))[..., None]
        x = _ratio(u, jnp.broadcast_to(step, u.shape))
        soft = jnp.concatenate([_shared(x, levels, weight) for weight in weights], axis=-1)
    if not encoder.scaled:
        return SketchedKeys(soft, None)
    if encoder.metric is None:
        energy, along = jnp.sum(jnp.square(centred), axis=-1), jnp.sum(code * u, axis=-1)
    else:
        true = jnp.einsum("...kd,ked->...ke", centred, encoder.metric)
        read = jnp.einsum("...kd,kbd->...kb", centred, encoder.reading)
        energy = jnp.sum(jnp.square(true), axis=-1)
        along = jnp.sum(straight_through(signs, soft) * read, axis=-1)
    return SketchedKeys(soft, jnp.minimum(_ratio(energy, along), encoder.longest))


def signed_queries(
    query: Float[Array, "batch tokens heads head_dim"],
    projection: Float[Array, "kv_heads head_dim bits"],
    signs: Float[Array, "batch tokens heads bits"],
) -> Float[Array, "batch tokens heads bits"]:
    """The signs of projected queries, with the gradient that the signs of keys have."""
    grouped = rearrange(
        query.astype(jnp.float32), "b t (k g) d -> b t k g d", k=projection.shape[0]
    )
    u = jnp.einsum("btkgd,kdc->btkgc", grouped, projection)
    u = rearrange(u, "b t k g c -> b t (k g) c")
    size = _ratio(jnp.sum(u * u, axis=-1), jnp.sum(jnp.abs(u), axis=-1))[..., None]
    soft = _shared(_ratio(u, jnp.broadcast_to(2.0 * size, u.shape)), 1.0, 1.0)
    return straight_through(signs, soft)


def _shared(
    x: Float[Array, "*vectors components"],
    levels: Float[Array, "*#vectors components"] | float,
    weight: Float[Array, "*#vectors components"] | float,
) -> Float[Array, "*vectors components"]:
    share = 6.0 * weight / (4.0 * levels * levels - 1.0)
    return share * jnp.clip(x, -levels, levels)


def _ratio(one: Float[Array, "*shape"], other: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`one / other`, 0 where that is not positive, and then without a gradient."""
    positive = other > 0
    return jnp.where(positive, one / jnp.where(positive, other, 1.0), 0.0)
