"""Rotations that make a coordinate-wise code lose little: iterative quantisation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_EXACT = jax.lax.Precision.HIGHEST
_ROUNDS = 40
_NEWTON_SCHULZ = 20


def iterative_quantisation(
    rng: Key[Array, ""],
    vectors: Float[Array, "samples head_dim"],
    components: int,
    code: Callable[[Float[Array, "samples components"]], Float[Array, "samples components"]],
) -> Float[Array, "components head_dim"]:
    """A matrix R whose coordinates `u = R v` lie close to their codes.

    Alternates between coding the coordinates and the rotation that takes the vectors nearest to
    their codes (ITQ, Gong and Lazebnik, CVPR 2011). With fewer components than channels, R first
    reduces to the principal subspace.

    Args:
        rng: of the rotation to begin with.
        vectors: centred.
        components: rows of R.
        code: from coordinates to codes.

    Returns:
        Orthonormal columns where `components >= head_dim`, orthonormal rows otherwise.
    """
    head_dim = vectors.shape[-1]
    reduced, principal = vectors, jnp.eye(head_dim)
    if components < head_dim:
        covariance = jnp.einsum("nd,ne->de", vectors, vectors, precision=_EXACT)
        principal = jnp.linalg.eigh(covariance)[1][:, -components:].T
        reduced = jnp.einsum("nd,cd->nc", vectors, principal, precision=_EXACT)
    shape = (components, min(components, head_dim))
    start = jnp.linalg.qr(jax.random.normal(rng, shape))[0]

    def improve(_: int, rotation: Array) -> Array:
        u = jnp.einsum("nd,cd->nc", reduced, rotation, precision=_EXACT)
        return _polar_factor(jnp.einsum("nc,nd->cd", code(u), reduced, precision=_EXACT))

    rotation = jax.lax.fori_loop(0, _ROUNDS, improve, start)
    # Newton and Schulz's iteration leaves a trace of error, which the decoder would repeat.
    left, _, right = jnp.linalg.svd(rotation, full_matrices=False)
    rotation = jnp.matmul(left, right, precision=_EXACT)
    return jnp.matmul(rotation, principal, precision=_EXACT)


def _polar_factor(matrix: Float[Array, "tall narrow"]) -> Float[Array, "tall narrow"]:
    """The nearest matrix with orthonormal columns, by products alone (Newton and Schulz)."""
    norm = jnp.linalg.norm(matrix)
    matrix = matrix / jnp.where(norm > 0, norm, 1.0)

    def step(_: int, x: Array) -> Array:
        square = jnp.matmul(x.T, x, precision=_EXACT)
        return 1.5 * x - 0.5 * jnp.matmul(x, square, precision=_EXACT)

    return jax.lax.fori_loop(0, _NEWTON_SCHULZ, step, matrix)
