"""Partial softmaxes and their exact merge.

Attention over a set of keys can be computed over disjoint parts: each part yields its own
normalised output and the log of its softmax denominator, and parts merge into the whole by
weighting outputs with `exp(lse - merged lse)` (Milakov and Gimelshein, arXiv 1805.02867;
Dao et al., arXiv 2205.14135).
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Partial(NamedTuple):
    """Attention over part of the keys.

    Attributes:
        output: float32, normalised over this part; 0 where the part is empty.
        lse: float32, log of the sum of exponentials of the logits; -inf where it is empty.
    """

    output: Float[Array, "*rows head_dim"]
    lse: Float[Array, "*rows"]


def softmax_partial(
    logits: Float[Array, "*rows keys"],
    visible: Bool[Array, "*#rows keys"],
    values: Float[Array, "*heads keys head_dim"],
) -> Partial:
    """Attention of each row of logits over the visible keys.

    Args:
        logits: already scaled, float32. Rows are `[*heads, groups, queries]`.
        visible: broadcast against `logits`; invisible keys have no weight.
        values: shared by the groups and queries of a head.
    """
    # Hidden before the exponential: one that overflows would turn gradients into NaN.
    logits = jnp.where(visible, logits, -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    # An empty part has no finite maximum; any finite reference keeps its exponentials at zero.
    reference = jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), 0.0, highest))
    weights = jnp.exp(logits - reference)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    output = (
        jnp.einsum(
            "...gqt,...td->...gqd",
            weights,
            values.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        / divisor
    )
    lse = jnp.where(empty, -jnp.inf, reference + jnp.log(divisor))
    return Partial(output, lse[..., 0])


def merge(*parts: Partial) -> Partial:
    """The attention over the keys of all parts, which must be disjoint. Exact up to rounding."""
    highest = reduce(jnp.maximum, (part.lse for part in parts))
    reference = jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), 0.0, highest))
    weights = [
        jnp.where(jnp.isneginf(part.lse), 0.0, jnp.exp(part.lse - reference)) for part in parts
    ]
    total = reduce(jnp.add, weights)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    weighted = (
        weight[..., None] * part.output for weight, part in zip(weights, parts, strict=True)
    )
    output = reduce(jnp.add, weighted) / divisor[..., None]
    return Partial(output, jnp.where(empty, -jnp.inf, reference + jnp.log(divisor)))
