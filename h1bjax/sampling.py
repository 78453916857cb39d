"""Choosing the next token: greedy, or at random after temperature, top-k, top-p and min-p."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Key

# The range of normal float32 numbers; a temperature below it is greedy.
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_LARGEST_TEMPERATURE = float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. All fields are traced, so changing them does not recompile.

    Attributes:
        temperature: Divides the logits; 0 chooses the most probable token.
        top_k: Keeps this many of the most probable tokens, and any that tie with the last; 0 keeps
            all.
        top_p: Keeps the fewest most probable tokens whose probabilities reach this sum; 1 keeps
            all.
        min_p: Keeps tokens at least this many times as probable as the most probable one; 0 keeps
            all.
    """

    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]
    min_p: Float32[Array, ""]

    @classmethod
    def create(
        cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
    ) -> Sampling:
        """Checks the values and puts them into arrays.

        Raises:
            ValueError: Naming every value that is out of range: temperature must be finite and at
                least 0, top_k an integer of at least 0, top_p in (0, 1], min_p in [0, 1).
        """
        largest_k = np.iinfo(np.int32).max
        checks = {
            f"temperature must be finite and at least 0, not {temperature!r}": (
                0 <= temperature <= _LARGEST_TEMPERATURE
            ),
            f"top_k must be an integer from 0 (off) to {largest_k}, not {top_k!r}": (
                isinstance(top_k, Integral)
                and not isinstance(top_k, bool)
                and 0 <= top_k <= largest_k
            ),
            f"top_p must be above 0 and at most 1 (off), not {top_p!r}": 0 < top_p <= 1,
            f"min_p must be at least 0 (off) and below 1, not {min_p!r}": 0 <= min_p < 1,
        }
        problems = [message for message, valid in checks.items() if not valid]
        if problems:
            raise ValueError("; ".join(problems))
        return cls(
            temperature=jnp.asarray(temperature, jnp.float32),
            top_k=jnp.asarray(top_k, jnp.int32),
            top_p=jnp.asarray(top_p, jnp.float32),
            min_p=jnp.asarray(min_p, jnp.float32),
        )


def row_keys(key: Key[Array, ""], batch: int, step: Int32[Array, ""] | int) -> Key[Array, "batch"]:
    """One key per row and step, from a key for the whole generation.

    A row's key depends on its index and the step alone, so what is sampled for it does not depend
    on its neighbours or on how many there are (with JAX's default generator; a vmapped "rbg" does
    not keep rows apart).
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(batch))


@jax.jit
def sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, keys: Key[Array, "batch"]
) -> Int32[Array, "batch"]:
    """Chooses a token for each row.

    Greedy choice sorts nothing and draws nothing; sampling sorts only when top-k or top-p is on.

    Args:
        logits: Unnormalised log-probabilities of any float dtype; -inf rules a token out.
        sampling: Temperature and filters, shared by the rows.
        keys: One key per row, as `row_keys` gives them.

    Returns:
        Token ids; -1 for a row whose logits contain NaN or +inf or are all -inf, so that the
        caller can raise instead of going on with a made-up token.
    """
    logits = logits.astype(jnp.float32)
    tokens = lax.cond(
        sampling.temperature < _SMALLEST_TEMPERATURE,
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        lambda: _draw(filter_logits(logits, sampling), keys),
    )
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), tokens, -1)


def filter_logits(
    logits: Float32[Array, "batch vocab"], sampling: Sampling
) -> Float32[Array, "batch vocab"]:
    """Logits after temperature, top-k, top-p and min-p, applied in this order.

    The most probable token of a row gets logit 0 and tokens that are filtered out get -inf, which
    leaves the same tokens as the processors of transformers. Among tokens of equal probability at
    the border of top-p the ones with the larger ids stay.

    Args:
        logits: At least one finite entry in each row and no NaN or +inf.
        sampling: The temperature must not be 0.
    """
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    filtered = lax.cond(
        (sampling.top_k > 0) | (sampling.top_p < 1),
        lambda: _top_k_top_p(scaled, sampling),
        lambda: scaled,
    )
    # Relative to the most probable token no normalisation is needed.
    return jnp.where(filtered >= jnp.log(sampling.min_p), filtered, -jnp.inf)


def _draw(logits: Float32[Array, "batch vocab"], keys: Key[Array, "batch"]) -> Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _top_k_top_p(
    logits: Float32[Array, "batch vocab"], sampling: Sampling
) -> Float32[Array, "batch vocab"]:
    vocab = logits.shape[-1]
    ascending = jnp.sort(logits, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    smallest = lax.dynamic_slice_in_dim(ascending, vocab - k, 1, axis=-1)
    ascending = jnp.where(ascending >= smallest, ascending, -jnp.inf)
    # The sum runs from the least probable token up, where float32 is exact enough for its tail.
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (below > 1 - sampling.top_p) | (jnp.arange(vocab) == vocab - 1)
    kept = jnp.where(sampling.top_p < 1, kept, ascending >= smallest)
    border = jnp.min(jnp.where(kept, ascending, jnp.inf), axis=-1, keepdims=True)
    # Counting the ties at the border replaces carrying token ids through the sort.
    ties_kept = jnp.sum(kept & (ascending == border), axis=-1, keepdims=True)
    ties = logits == border
    ties_from_here = jnp.flip(jnp.cumsum(jnp.flip(ties, -1), axis=-1, dtype=jnp.int32), -1)
    return jnp.where((logits > border) | (ties & (ties_from_here <= ties_kept)), logits, -jnp.inf)
