"""What training minimises: the loss on the next token, and the divergence from a teacher."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32

from h1bjax.decoder import Decoder, unembed

LOGITS = 1 << 26
"""Logits that exist at a time, in float32, unless one token of every row has more already.

With a teacher, there are its own besides.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """Means over all predicted tokens, natural logarithm.

    Attributes:
        next_token: negative log-likelihood of the token that comes next.
        divergence: `KL(teacher ‖ student)` of what each expects to come next, 0 without a teacher.
    """

    next_token: Float32[Array, ""]
    divergence: Float32[Array, ""]

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def __truediv__(self, divisor: int) -> Self:
        return jax.tree.map(lambda loss: loss / divisor, self)


def losses(
    student: Decoder,
    windows: Int32[Array, "batch context_and_one"],
    *,
    teacher: Decoder | None = None,
    compressed: bool = False,
    remat: bool = False,
) -> Losses:
    """The losses of each token after the first.

    Logits are made in blocks of tokens, again in the backward pass, so that those of the whole
    batch never exist at once.

    Args:
        student: see `Decoder` on which of its parameters may be wider than its compute dtype.
        windows: token ids without padding.
        teacher: attends exactly, and gets no gradient; None for no divergence.
        compressed: whether the student attends as through its cache, and not exactly.
        remat: see `Decoder.__call__`; of the student.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    hidden, _ = student.hidden(tokens, None, compressed=compressed, remat=remat)
    matrix = student.unembedding_matrix()
    rows = [hidden]
    if teacher is not None:
        taught, _ = teacher.hidden(tokens, None)
        rows.append(jax.lax.stop_gradient(taught))
        teacher_matrix = jax.lax.stop_gradient(teacher.unembedding_matrix())
    # Blocks take the same tokens of every row, so that rows can lie on different devices.
    batch, length = tokens.shape
    block = max(1, min(length, LOGITS // (batch * matrix.shape[1])))
    missing = -length % block
    # No token has the id -1, so what fills the last block counts nothing.
    targets = jnp.pad(targets, ((0, 0), (0, missing)), constant_values=-1)

    @jax.checkpoint
    def of_block(part: tuple[Array, list[Array]]) -> Losses:
        targets, (hidden, *taught) = part
        logits = _logits(hidden, matrix)
        # A sum instead of a lookup, whose gradient would be a scatter.
        wanted = targets[..., None] == jnp.arange(logits.shape[-1])
        chosen = jnp.sum(jnp.where(wanted, logits, 0.0), axis=-1)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        counted = targets >= 0
        nats = jnp.sum(jnp.where(counted, normaliser - chosen, 0.0))
        if not taught:
            return Losses(nats, jnp.float32(0))
        known = jax.nn.log_softmax(unembed(taught[0], teacher_matrix))
        divergence = jnp.sum(jnp.exp(known) * (known - logits), axis=-1) + normaliser
        return Losses(nats, jnp.sum(jnp.where(counted, divergence, 0.0)))

    padded = [jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in rows]
    blocks = [rearrange(x, "b (n t) e -> n b t e", t=block) for x in padded]
    sums = jax.lax.map(of_block, (rearrange(targets, "b (n t) -> n b t", t=block), blocks))
    return jax.tree.map(lambda sums: jnp.sum(sums) / (batch * length), sums)


@jax.custom_vjp
def _logits(
    hidden: Float[Array, "batch tokens embed"], matrix: Float[Array, "embed vocab"]
) -> Float32[Array, "batch tokens vocab"]:
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
    to_hidden = jnp.einsum("btv,ev->bte", narrow, matrix.astype(hidden.dtype))
    to_matrix = jnp.einsum(
        "ne,nv->ev",
        rearrange(hidden, "b t e -> (b t) e"),
        rearrange(narrow, "b t v -> (b t) v"),
        preferred_element_type=matrix.dtype,
    )
    return to_hidden, to_matrix


_logits.defvjp(_logits_forward, _logits_backward)
