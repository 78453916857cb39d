"""Transform coding of keys: a principal basis, a share of the bits for each component, steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

_EXACT = jax.lax.Precision.HIGHEST

DEEPEST = 8
"""The most bits of one component."""

_TABLE_SAMPLES = 8192
"""About so many of the keys decide on steps."""

_FLOOR = 1e-3
"""Directions that queries hardly look at count at least this fraction of the strongest."""

# The steps that quantise a Gaussian of unit variance best with 1 to 8 bits (Max, IRE Trans. 1960).
_GAUSSIAN_STEPS = (1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0568, 0.0307)
_STEP_FACTORS = np.geomspace(0.5, 2.0, 15)


class LinearCodeFit(NamedTuple):
    """The parameters of a `LinearCode` for one KV head, a row for every bit."""

    projection: Float[Array, "bits head_dim"]
    transform: Float[Array, "head_dim bits"]
    levels: Float[Array, "bits"]
    weight: Float[Array, "bits"]
    metric: Float[Array, "head_dim head_dim"]


def fit_linear_code(
    keys: Float[Array, "samples head_dim"],
    query_moment: Float[Array, "head_dim head_dim"],
    bits: int,
) -> LinearCodeFit:
    """Fits a transform code that makes `E[(q·(k - k̂))²]` small.

    With `M = E[q qᵀ]`, the error of a logit is the length of `M^½(k - k̂)`; so keys are projected
    on the principal basis of `M^½ k`, where errors of components add up. Each component gets
    bits where one more bit saves most (the integer form of reverse water-filling), and the step
    that fits the sample best.

    Args:
        keys: centred.
        query_moment: M.
        bits: in all, at most 8 for each channel.
    """
    values, vectors = jnp.linalg.eigh(query_moment)
    # A head whose queries never read a sketch has no moment; any metric is good for it.
    strongest = jnp.where(values[-1] > 0, values[-1], 1.0)
    values = jnp.maximum(values, _FLOOR * strongest)
    root = _symmetric(vectors, jnp.sqrt(values))
    inverse_root = _symmetric(vectors, 1 / jnp.sqrt(values))
    weighted = jnp.matmul(keys, root, precision=_EXACT)
    covariance = jnp.matmul(weighted.T, weighted, precision=_EXACT) / len(weighted)
    basis = jnp.linalg.eigh(covariance)[1][:, ::-1]

    components = jnp.matmul(weighted, basis, precision=_EXACT)
    errors, steps = _error_table(components[:: max(1, len(keys) // _TABLE_SAMPLES)])
    depth = allocate_bits(errors, bits)
    channel = jnp.arange(keys.shape[1])
    step = steps[depth, channel]

    component = jnp.repeat(channel, depth, total_repeat_length=bits)
    first = jnp.cumsum(depth) - depth
    weight = 2.0 ** (jnp.arange(bits) - first[component])
    encode = jnp.matmul(root, basis, precision=_EXACT)[:, component] / step[component]
    decode = jnp.matmul(inverse_root, basis, precision=_EXACT)[:, component]
    return LinearCodeFit(
        projection=encode.T,
        transform=decode * (weight * step[component] / 2),
        levels=2.0 ** (depth[component] - 1),
        weight=weight,
        metric=root,
    )


def allocate_bits(
    errors: Float[Array, "depths components"], bits: int
) -> Int32[Array, "components"]:
    """Bits of each component, one at a time to where one more saves the largest squared error.

    Args:
        errors: squared error of each component with 0, 1, 2, … bits.
        bits: how many to share out, at most the deepest for every component.
    """
    deepest, channel = errors.shape[0] - 1, jnp.arange(errors.shape[1])

    def give(_: int, depth: Array) -> Array:
        deeper = jnp.minimum(depth + 1, deepest)
        gain = jnp.where(
            depth < deepest, errors[depth, channel] - errors[deeper, channel], -jnp.inf
        )
        return depth.at[jnp.argmax(gain)].add(1)

    return jax.lax.fori_loop(0, bits, give, jnp.zeros(errors.shape[1], jnp.int32))


def _error_table(
    components: Float[Array, "samples components"],
) -> tuple[Float[Array, "depths components"], Float[Array, "depths components"]]:
    """Mean squared error and best step of a uniform quantiser with 0, 1, … bits."""
    energy = jnp.mean(jnp.square(components), axis=0)
    deviation = jnp.sqrt(jnp.where(energy > 0, energy, 1.0))

    def quantised(depth: Array, step: Array) -> Array:
        half = 2.0 ** (depth - 1)
        level = jnp.clip(jnp.floor(components / step), -half, half - 1) + 0.5
        return jnp.mean(jnp.square(components - level * step), axis=0)

    def best(depth_and_step: tuple[Array, Array]) -> tuple[Array, Array]:
        depth, typical = depth_and_step
        candidates = typical * deviation * jnp.asarray(_STEP_FACTORS, jnp.float32)[:, None]
        errors = jax.lax.map(lambda step: quantised(depth, step), candidates)
        chosen = jnp.argmin(errors, axis=0)
        channel = jnp.arange(len(chosen))
        return errors[chosen, channel], candidates[chosen, channel]

    depths = jnp.arange(1, DEEPEST + 1, dtype=jnp.float32)
    errors, steps = jax.lax.map(best, (depths, jnp.asarray(_GAUSSIAN_STEPS, jnp.float32)))
    return jnp.concatenate([energy[None], errors]), jnp.concatenate([deviation[None], steps])


def _symmetric(
    vectors: Float[Array, "head_dim head_dim"], values: Float[Array, "head_dim"]
) -> Float[Array, "head_dim head_dim"]:
    return jnp.matmul(vectors * values, vectors.T, precision=_EXACT)
