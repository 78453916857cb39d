"""The temperature and offset that bring sketched attention closest to exact attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_ROUNDS = 16
_LARGEST_MOVE = 1.0
_PRIOR = 1e-3
_LOWEST_TEMPERATURE = 0.05


def fit_temperature(
    exact: Float[Array, "windows heads queries keys"],
    sketched: Float[Array, "windows heads queries keys"],
    causal: Bool[Array, "queries keys"],
    stored: Bool[Array, "queries keys"],
) -> tuple[Float[Array, "heads"], Float[Array, "heads"]]:
    """τ and δ of each query head that minimise the mean divergence from exact attention.

    Attention with the logits `τ·sketched + δ` where keys are read from their sketch, and `exact`
    elsewhere, is compared with exact attention by `KL(exact ‖ sketched)`. That is convex in τ and
    δ, so Newton's method finds the minimum from first and second moments of the logits alone. A
    weak prior holds τ near 1 and δ near 0 where the sample says nothing.

    Args:
        exact: logits of the true keys.
        sketched: logits of the sketches, with the part that all keys share.
        causal: which keys a query sees at all.
        stored: which of them it reads from their sketch.
    """
    heads = exact.shape[1]

    def moments(theta: Array) -> tuple[Array, Array]:
        temperature, offset = (theta[:, index, None, None] for index in (0, 1))

        def window(logits: tuple[Array, Array]) -> tuple[Array, Array]:
            true, read = logits
            wanted = _softmax(true, causal)
            got = _softmax(jnp.where(stored, temperature * read + offset, true), causal)
            features = jnp.where(stored, read, 0.0), jnp.broadcast_to(stored, read.shape)
            mean = [jnp.sum(got * feature, axis=-1) for feature in features]
            target = [jnp.sum(wanted * feature, axis=-1) for feature in features]
            gradient = jnp.stack(
                [jnp.mean(m - t, axis=-1) for m, t in zip(mean, target, strict=True)], axis=-1
            )
            square = jnp.sum(got * jnp.square(features[0]), axis=-1)
            # The offset's feature is 0 or 1, so it is its own square.
            products = (
                square - mean[0] * mean[0],
                mean[0] - mean[0] * mean[1],
                mean[1] - mean[1] * mean[1],
            )
            a, b, c = (jnp.mean(product, axis=-1) for product in products)
            return gradient, jnp.stack([jnp.stack([a, b], -1), jnp.stack([b, c], -1)], -1)

        gradient, curvature = jax.lax.map(window, (exact, sketched))
        return jnp.mean(gradient, axis=0), jnp.mean(curvature, axis=0)

    neutral = jnp.broadcast_to(jnp.array([1.0, 0.0]), (heads, 2))

    def improve(_: int, theta: Array) -> Array:
        gradient, curvature = moments(theta)
        gradient = gradient + _PRIOR * (theta - neutral)
        move = jnp.linalg.solve(curvature + _PRIOR * jnp.eye(2), gradient[..., None])[..., 0]
        # Far from the minimum the curvature can nearly vanish, and a full step would overshoot.
        largest = jnp.max(jnp.abs(move), axis=-1, keepdims=True)
        theta = theta - move * jnp.minimum(1.0, _LARGEST_MOVE / jnp.maximum(largest, 1e-9))
        return theta.at[:, 0].max(_LOWEST_TEMPERATURE)

    theta = jax.lax.fori_loop(0, _ROUNDS, improve, neutral)
    return theta[:, 0], theta[:, 1]


def _softmax(logits: Array, visible: Bool[Array, "queries keys"]) -> Array:
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
