"""Sketch attention on TPUs, through Pallas's Mosaic backend.

Tokens lie along lanes. A grid step reads a block of tokens of up to eight KV heads where the cache
has them; the layer and each row's length are scalars known before, so that blocks beyond a row's
end are neither fetched nor computed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.sketch_attention.arguments import PackedKeys, PackedValues, SketchQuery
from pallas_kernels.sketch_attention.partial import Partial
from pallas_kernels.sketch_attention.tpu.block_rope import rope_operands
from pallas_kernels.sketch_attention.tpu.kernel import Inputs, call
from pallas_kernels.sketch_attention.tpu.operands import query_operands
from pallas_kernels.sketch_attention.tpu.plan import Plan
from pallas_kernels.sketch_attention.tpu.tuning import divide

_MOST_BITS = 256
_MOST_GROUPS = 16
_WIDEST = 256
_PERIODS = (32, 64, 128)


def refusal(query: SketchQuery, keys: PackedKeys, values: PackedValues) -> str | None:
    """Why the kernel cannot run these arguments; None if it can."""
    queries, heads, head_dim = query.vectors.shape[1:]
    kv_heads, _, bits = query.transform.shape
    if queries != 1:
        return f"it takes one query per row, not {queries}"
    if heads // kv_heads > _MOST_GROUPS:
        return f"it takes up to {_MOST_GROUPS} query heads per KV head, not {heads // kv_heads}"
    if head_dim % 8 or head_dim > _WIDEST:
        return f"it takes a head_dim of multiples of 8 up to {_WIDEST}, not {head_dim}"
    if values.bits == 3 and head_dim % 32:
        return f"it takes no 3-bit values of {head_dim} channels"
    if bits > _MOST_BITS:
        return f"it takes sketches of up to {_MOST_BITS} bits, not {bits}"
    if query.rope is not None:
        if query.rope.period not in _PERIODS:
            return f"it takes a RoPE period of {_PERIODS}, not {query.rope.period}"
        if query.signed:
            return "with a RoPE period it takes no signed query"
    return None


def sketch_attention(
    query: SketchQuery,
    keys: PackedKeys,
    values: PackedValues,
    layer: Int32[Array, ""],
    *,
    start: int,
    stop: Int32[Array, "batch queries"],
) -> Partial:
    """See `pallas_kernels.sketch_attention.sketch_attention`."""
    plan = plan_of(query, keys, values, start)
    coefficients = turned = None
    if query.rope is not None:
        turned, constants = rope_operands(query, query.rope, plan)
    else:
        coefficients, constants = query_operands(query, plan)
    output, lse = call(
        plan,
        Inputs(
            layer=layer.reshape(1).astype(jnp.int32),
            stop=stop[:, 0].astype(jnp.int32),
            constants=constants,
            coefficients=coefficients,
            turned=turned,
            key_words=keys.words,
            key_scales=keys.scales,
            value_words=values.words,
            value_affine=values.affine,
        ),
    )
    heads = (plan.batch, 1, plan.kv_heads * plan.groups)
    output = output[:, :, : plan.groups, : plan.head_dim]
    return Partial(output.reshape(*heads, plan.head_dim), lse[:, :, : plan.groups].reshape(heads))


def plan_of(query: SketchQuery, keys: PackedKeys, values: PackedValues, start: int) -> Plan:
    """How a call with these arguments is divided; only shapes matter."""
    kv_heads, head_dim, bits = query.transform.shape
    return divide(
        batch=keys.words.shape[1],
        kv_heads=kv_heads,
        groups=query.vectors.shape[2] // kv_heads,
        head_dim=head_dim,
        bits=bits,
        value_bits=values.bits,
        tokens=keys.words.shape[-1],
        start=start,
        scaled=keys.scales is not None,
        signed=query.signed,
        variance=query.variance is not None,
        code_planes=query.planes,
        period=None if query.rope is None else query.rope.period,
    )
