"""Rotary position embedding in the half-split convention (Su et al., arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    angle = position[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
