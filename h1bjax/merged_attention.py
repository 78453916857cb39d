"""Causal attention in parts that merge by their log-sum-exp, with a gradient.

With the log-sum-exp L and the output o of the whole, a part's weights are `exp(s - L)`, so that
its gradient is the usual one of flash attention (arXiv 2307.08691) computed with L and o instead
of its own. JAX's fused attention can give a log-sum-exp, but rounds it to the dtype of the output
and silently gives it no gradient, which is why parts are not simply merged and differentiated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Self

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from h1bjax.fused_attention import Implementation
from pallas_kernels.sketch_attention import Partial, merge, softmax_partial
from pallas_kernels.sketch_attention.blocks import heads_last

SAVED = "merged_attention"
"""The `checkpoint_name` of what a backward pass needs and only the attention itself can give."""

_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """Causal attention of the queries from one on to some keys.

    Attributes:
        query: the queries of the tokens from `begin` on. Head `h` reads KV head
            `h // (heads // kv_heads)`.
        keys: query i of these sees keys `j <= i`.
        values: of the same tokens; all parts' have the same channels.
        shift: added to all logits of each query; None for nothing.
        scale: of the products of queries and keys.
        window: query i sees only keys `j > i - window`; None for all. Static.
        begin: the first token that has a query here. Static.
        implementation: "cudnn" is fused; "xla" holds all weights in float32. Static.
    """

    query: Float[Array, "batch queries heads channels"]
    keys: Float[Array, "batch keys kv_heads channels"]
    values: Float[Array, "batch keys kv_heads head_dim"]
    shift: Float[Array, "batch queries heads"] | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})
    begin: int = field(default=0, metadata={"static": True})
    implementation: Implementation = field(default="xla", metadata={"static": True})

    @property
    def tokens(self) -> int:
        """Tokens of the whole rows."""
        return self.begin + self.query.shape[1]


def merged_attention(parts: Sequence[Part]) -> Float[Array, "batch tokens heads head_dim"]:
    """One softmax over the keys of all parts, which must be different tokens for every query.

    Args:
        parts: of the same rows; the first one begins with their first token, so that every query
            sees something.

    Returns:
        In the dtype of the first part's queries.

    Raises:
        ValueError: the first part begins later, or the parts are not of the same rows.
    """
    parts = tuple(parts)
    if not parts or parts[0].begin:
        raise ValueError("the first part of merged attention must begin with the first token")
    if len({part.tokens for part in parts}) > 1:
        raise ValueError(f"parts end with different tokens: {[part.tokens for part in parts]}")
    return _merged(parts)


@jax.custom_vjp
def _merged(parts: tuple[Part, ...]) -> Float[Array, "batch tokens heads head_dim"]:
    return _forward(parts)[0]


def _forward(parts: tuple[Part, ...]) -> tuple[Array, Array, list[Partial]]:
    """The output, the log-sum-exp of the whole, and the parts on their own."""
    own = [_partial(part) for part in parts]
    whole = reduce(
        merge, [_from_start(part, alone) for part, alone in zip(parts, own, strict=True)]
    )
    return whole.output.astype(parts[0].query.dtype), whole.lse, own


def _merged_forward(parts: tuple[Part, ...]) -> tuple[Array, tuple]:
    output, lse, own = _forward(parts)
    output, lse = checkpoint_name((output, lse), SAVED)
    # What a shift does to the output depends on what the part alone would give.
    shifted = [
        checkpoint_name((alone.output.astype(output.dtype), alone.lse), SAVED)
        if part.shift is not None
        else None
        for part, alone in zip(parts, own, strict=True)
    ]
    return output, (parts, output, lse, shifted)


def _merged_backward(saved: tuple, gradient: Array) -> tuple[tuple[Part, ...]]:
    parts, output, lse, shifted = saved
    gradients = []
    for part, alone in zip(parts, shifted, strict=True):
        rows = slice(part.begin, None)
        to_output, whole = gradient[:, rows], output[:, rows]
        # In the part's own logits, before the shift.
        reference = lse[:, rows] if part.shift is None else lse[:, rows] - part.shift
        backward = _cudnn_gradients if part.implementation == "cudnn" else _xla_gradients
        query, keys, values = backward(part, reference, whole, to_output)
        shift = None
        if part.shift is not None:
            own_output, own_lse = alone
            share = jnp.exp(own_lse - lse[:, rows])
            wide = to_output.astype(jnp.float32)
            gain = jnp.sum(wide * (own_output.astype(jnp.float32) - whole), axis=-1)
            shift = (share * gain).astype(part.shift.dtype)
        gradients.append(replace(part, query=query, keys=keys, values=values, shift=shift))
    return (tuple(gradients),)


_merged.defvjp(_merged_forward, _merged_backward)


def _partial(part: Part) -> Partial:
    """A part on its own, its shift included; float32."""
    if part.implementation == "cudnn":
        call = _CudnnCall.of(part)
        output, lse = call.partial(part.values.shape[-1])
    else:
        logits, visible = _xla_logits(part), _visible(part)
        output, lse = heads_last(softmax_partial(logits, visible, _by_head(part.values)))
    return Partial(output, lse if part.shift is None else lse + part.shift)


def _from_start(part: Part, alone: Partial) -> Partial:
    """The same for the rows from their first token on, which sees nothing here."""
    before = (0, 0), (part.begin, 0), (0, 0)
    return Partial(
        jnp.pad(alone.output, (*before, (0, 0))),
        jnp.pad(alone.lse, before, constant_values=-jnp.inf),
    )


def _xla_gradients(
    part: Part,
    lse: Float[Array, "batch queries heads"],
    output: Float[Array, "batch queries heads head_dim"],
    gradient: Float[Array, "batch queries heads head_dim"],
) -> tuple[Array, Array, Array]:
    """The gradients of a part's queries, keys and values, given the whole."""
    kv_heads = part.keys.shape[2]

    def grouped(x: Array) -> Array:
        return rearrange(x.astype(jnp.float32), "b q (k g) ... -> b k g q ...", k=kv_heads)

    query, wide, whole, reference = map(grouped, (part.query, gradient, output, lse))
    keys, values = (_by_head(x).astype(jnp.float32) for x in (part.keys, part.values))
    weights = jnp.where(_visible(part), jnp.exp(_xla_logits(part) - reference[..., None]), 0.0)

    def product(pattern: str, one: Array, other: Array) -> Array:
        return jnp.einsum(pattern, one, other, precision=_EXACT)

    to_weights = product("bkgqd,bktd->bkgqt", wide, values)
    common = jnp.sum(wide * whole, axis=-1, keepdims=True)
    to_logits = weights * (to_weights - common) * part.scale
    to_query = product("bkgqt,bktd->bkgqd", to_logits, keys)
    to_keys = product("bkgqt,bkgqd->btkd", to_logits, query)
    to_values = product("bkgqt,bkgqd->btkd", weights, wide)
    return (
        rearrange(to_query, "b k g q d -> b q (k g) d").astype(part.query.dtype),
        to_keys.astype(part.keys.dtype),
        to_values.astype(part.values.dtype),
    )


def _cudnn_gradients(
    part: Part,
    lse: Float[Array, "batch queries heads"],
    output: Float[Array, "batch queries heads head_dim"],
    gradient: Float[Array, "batch queries heads head_dim"],
) -> tuple[Array, Array, Array]:
    """The same by cuDNN's backward pass, told the whole's log-sum-exp and output."""
    to_query, to_keys, to_values = _CudnnCall.of(part).gradients(lse, output, gradient)
    channels, head_dim = part.query.shape[-1], part.values.shape[-1]
    return to_query[..., :channels], to_keys[..., :channels], to_values[..., :head_dim]


@dataclass(frozen=True)
class _CudnnCall:
    """A call of cuDNN's attention, and what its backward pass starts from.

    JAX has no function for a backward pass with another log-sum-exp and output. But the pullback
    of its fused attention is a pytree that holds those of the call itself, in which they can be
    read and replaced; XLA leaves out a forward pass that nothing reads.

    Attributes:
        output: of the call.
        leaves: of the pullback.
        structure: likewise.
        lse_place: where the log-sum-exp, `[batch, heads, queries]`, is among the leaves.
        output_place: where the output is.
    """

    output: Float[Array, "batch queries heads channels"]
    leaves: list[Array]
    structure: Any
    lse_place: int
    output_place: int

    @classmethod
    def of(cls, part: Part) -> Self:
        """Calls cuDNN's attention.

        Raises:
            NotImplementedError: this version of JAX keeps other things for the backward pass.
        """
        query, keys, values = inputs = _of_one_width(part)

        def attend(query: Array, keys: Array, values: Array) -> Array:
            return jax.nn.dot_product_attention(
                query,
                keys,
                values,
                is_causal=True,
                scale=part.scale,
                local_window_size=None if part.window is None else (part.window - 1, 0),
                implementation="cudnn",
            )

        output, pullback = jax.vjp(attend, query, keys, values)
        leaves, structure = jax.tree.flatten(pullback)
        batch, queries, heads, _ = query.shape
        statistics, outputs = [], []
        for place, leaf in enumerate(leaves):
            if leaf.dtype == jnp.float32 and leaf.shape == (batch, heads, queries):
                statistics.append(place)
            elif leaf.shape == query.shape and not any(leaf is given for given in inputs):
                outputs.append(place)
        if len(statistics) != 1 or len(outputs) != 1:
            raise NotImplementedError(
                f"this version of JAX ({jax.__version__}) keeps other things for the backward pass "
                f"of cuDNN's attention than expected: {[leaf.aval for leaf in leaves]}"
            )
        return cls(output, leaves, structure, statistics[0], outputs[0])

    def partial(self, head_dim: int) -> Partial:
        """The output without what was filled up, and its log-sum-exp; float32."""
        lse = jnp.moveaxis(self.leaves[self.lse_place], 1, 2)
        return Partial(self.output[..., :head_dim].astype(jnp.float32), lse)

    def gradients(
        self,
        lse: Float[Array, "batch queries heads"],
        output: Float[Array, "batch queries heads head_dim"],
        gradient: Float[Array, "batch queries heads head_dim"],
    ) -> tuple[Array, Array, Array]:
        """The gradients of queries, keys and values if these came of the call."""
        channels, leaves = self.output.shape[-1], list(self.leaves)
        leaves[self.lse_place] = jnp.moveaxis(lse, 2, 1)
        leaves[self.output_place] = _widened(output, channels)
        return jax.tree.unflatten(self.structure, leaves)(_widened(gradient, channels))


def _of_one_width(part: Part) -> tuple[Array, Array, Array]:
    """Queries, keys and values, filled up with zeros to the same number of channels."""
    channels = max(part.query.shape[-1], part.values.shape[-1])
    query, keys, values = (_widened(x, channels) for x in (part.query, part.keys, part.values))
    return query, keys, values


def _widened(
    x: Float[Array, "batch tokens heads channels"], channels: int
) -> Float[Array, "batch tokens heads more_channels"]:
    missing = channels - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x


def _xla_logits(part: Part) -> Float[Array, "batch kv_heads groups queries keys"]:
    products = jnp.einsum(
        "bkgqd,bktd->bkgqt",
        rearrange(part.query, "b q (k g) d -> b k g q d", k=part.keys.shape[2]),
        _by_head(part.keys),
        precision=_EXACT,
        preferred_element_type=jnp.float32,
    )
    return products * part.scale


def _visible(part: Part) -> Bool[Array, "queries keys"]:
    i, j = jnp.arange(part.query.shape[1])[:, None], jnp.arange(part.keys.shape[1])
    causal = j <= i
    return causal if part.window is None else causal & (j > i - part.window)


def _by_head(
    x: Float[Array, "batch tokens kv_heads channels"],
) -> Float[Array, "batch kv_heads tokens channels"]:
    return jnp.moveaxis(x, 2, 1)
