"""What training minimises: the negative log-likelihood of the next token."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32

from h1bjax.decoder import Decoder, unembed

LOGITS = 1 << 26
"""Logits that exist at a time, in float32."""


def next_token_nats(
    decoder: Decoder,
    windows: Int32[Array, "batch context_and_one"],
    *,
    remat: bool = False,
) -> Float32[Array, ""]:
    """Mean negative log-likelihood of each token after the first, natural logarithm.

    Attention is exact. Logits are made in blocks of tokens, again in the backward pass, so that
    those of the whole batch never exist at once.

    Args:
        decoder: see `Decoder` on which of its parameters may be wider than its compute dtype.
        windows: token ids without padding.
        remat: see `Decoder.__call__`.
    """
    hidden, _ = decoder.hidden(windows[:, :-1], None, remat=remat)
    matrix = decoder.unembedding_matrix()
    rows, targets = rearrange(hidden, "b t e -> (b t) e"), rearrange(windows[:, 1:], "b t -> (b t)")
    count = len(targets)
    block = max(1, min(count, LOGITS // matrix.shape[1]))
    missing = -count % block
    # No token has the id -1, so what fills the last block counts nothing.
    rows = jnp.pad(rows, ((0, missing), (0, 0)))
    targets = jnp.pad(targets, (0, missing), constant_values=-1)

    @jax.checkpoint
    def nats(part: tuple[Array, Array]) -> Float32[Array, ""]:
        rows, targets = part
        logits = _logits(rows, matrix)
        # A sum instead of a lookup, whose gradient would be a scatter.
        wanted = targets[:, None] == jnp.arange(logits.shape[1])
        chosen = jnp.sum(jnp.where(wanted, logits, 0.0), axis=1)
        losses = jax.nn.logsumexp(logits, axis=1) - chosen
        return jnp.sum(jnp.where(targets >= 0, losses, 0.0))

    parts = (
        rearrange(rows, "(n t) e -> n t e", t=block),
        rearrange(targets, "(n t) -> n t", t=block),
    )
    return jnp.sum(jax.lax.map(nats, parts)) / count


@jax.custom_vjp
def _logits(
    hidden: Float[Array, "tokens embed"], matrix: Float[Array, "embed vocab"]
) -> Float32[Array, "tokens vocab"]:
    """Float32 logits whose gradient is multiplied in the dtype of the hidden states.

    JAX's own gradient of a product with a float32 result multiplies in float32, which is several
    times slower.
    """
    return unembed(hidden, matrix)


def _logits_forward(hidden: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return unembed(hidden, matrix), (hidden, matrix)


def _logits_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, matrix = saved
    narrow = gradient.astype(hidden.dtype)
    to_hidden = jnp.einsum("tv,ev->te", narrow, matrix.astype(hidden.dtype))
    to_matrix = jnp.einsum("te,tv->ev", hidden, narrow, preferred_element_type=matrix.dtype)
    return to_hidden, to_matrix


_logits.defvjp(_logits_forward, _logits_backward)
