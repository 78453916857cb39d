"""Rotary position embedding in the half-split convention (Su et al., arXiv 2104.09864)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


class Turn(NamedTuple):
    """Cosines and sines of the angles by which channel pairs are rotated."""

    cos: Float32[Array, "*batch half_dim"]
    sin: Float32[Array, "*batch half_dim"]


def turn(position: Int[Array, "*batch"], frequencies: Float[Array, "half_dim"]) -> Turn:
    """The rotation by `position · frequencies[i]` radians; computed once, it serves many layers.

    Args:
        position: signed token positions.
        frequencies: radians per token of each channel pair.
    """
    angle = position[..., None].astype(jnp.float32) * frequencies
    return Turn(jnp.cos(angle), jnp.sin(angle))


def rotate(
    x: Float[Array, "*batch head_dim"],
    position: Int[Array, "*#batch"],
    frequencies: Float[Array, "half_dim"],
) -> Float[Array, "*batch head_dim"]:
    """Rotates channel pairs `(i, i + head_dim/2)` of `x` by `position · frequencies[i]` radians.

    Rotations compose: rotating by `a` and then by `b` is rotating by `a + b`. Angles and the
    rotation are float32; the result has the dtype of `x`.

    Args:
        x: vectors, the head dimension last.
        position: signed token positions, broadcast against the other axes of `x`.
        frequencies: radians per token of each channel pair.
    """
    return rotate_by(x, turn(position, frequencies))


def rotate_by(x: Float[Array, "*batch head_dim"], turn: Turn) -> Float[Array, "*batch head_dim"]:
    """`rotate`, given its cosines and sines, which are broadcast against `x`."""
    cos, sin = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
