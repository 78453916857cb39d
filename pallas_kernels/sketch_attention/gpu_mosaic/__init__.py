"""Sketch attention on Hopper and later, through Pallas's Mosaic GPU backend.

One warp reads 32 tokens of one row and KV head at a time, straight from global memory into the
registers from which tensor cores multiply: bits and codes are never converted. Query heads share
what is read.
"""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_gpu.attention import launch_attention
from pallas_kernels.mosaic_gpu.launch import Block, refusal_of_version
from pallas_kernels.mosaic_gpu.registers import I32, I64
from pallas_kernels.packing import pack_column
from pallas_kernels.sketch_attention.arguments import PackedKeys, PackedValues, SketchQuery
from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import prepare_transform
from pallas_kernels.sketch_attention.gpu_mosaic.kernel import attend
from pallas_kernels.sketch_attention.gpu_mosaic.lane import Operands
from pallas_kernels.sketch_attention.gpu_mosaic.plan import Plan
from pallas_kernels.sketch_attention.gpu_mosaic.tuning import divide
from pallas_kernels.sketch_attention.gpu_mosaic.values import ValueLayout
from pallas_kernels.sketch_attention.partial import Partial

_PERIODS = (32, 64, 128)
_MOST_BITS = 256
_MOST_GROUPS = 16
_WIDEST = 256


def refusal(query: SketchQuery, keys: PackedKeys, values: PackedValues) -> str | None:
    """Why the kernel cannot run these arguments; None if it can."""
    version = refusal_of_version()
    if version is not None:
        return version
    queries, heads, head_dim = query.vectors.shape[1:]
    kv_heads, _, bits = query.transform.shape
    if queries != 1:
        return f"it takes one query per row, not {queries}"
    if heads // kv_heads > _MOST_GROUPS:
        return f"it takes up to {_MOST_GROUPS} query heads per KV head, not {heads // kv_heads}"
    if head_dim % 16 or head_dim > _WIDEST:
        return f"it takes a head_dim of multiples of 16 up to {_WIDEST}, not {head_dim}"
    if bits > _MOST_BITS:
        return f"it takes sketches of up to {_MOST_BITS} bits, not {bits}"
    layout = ValueLayout.of(head_dim, values.bits)
    if not layout.supported(head_dim):
        return f"it takes no {values.bits}-bit values of {head_dim} channels"
    if query.rope is not None:
        if query.rope.period not in _PERIODS:
            return f"it takes a RoPE period of {_PERIODS}, not {query.rope.period}"
        if head_dim % 32:
            return f"with a RoPE period it takes a head_dim of multiples of 32, not {head_dim}"
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
    plan = _plan(query, keys, values, start)
    arrays: dict[str, Array] = {
        "layer": layer.reshape(1).astype(jnp.int32),
        "stop": stop.reshape(-1).astype(jnp.int32),
        "key_words": keys.words,
        "value_words": values.words,
        "value_affine": values.affine,
    }
    if plan.scale is None:
        arrays["scale"] = jnp.asarray(query.scale, jnp.float32)
    if keys.scales is not None:
        arrays["key_scales"] = keys.scales
    if query.signed:
        arrays["signs"] = _query_signs(query)
    else:
        prepared = query.prepared or prepare_transform(query.transform[None])
        arrays["queries"] = query.vectors.astype(jnp.float32)
        arrays["fragments"] = prepared.fragments
        arrays["norm"] = prepared.norm
    if query.variance is not None:
        arrays["variance"] = query.variance.astype(jnp.float32)
    if query.rope is not None:
        arrays["frequencies"] = query.rope.frequencies.astype(jnp.float32)
        arrays["mean"] = query.rope.mean.astype(jnp.float32)
    names = [*arrays, "output", "lse"]

    def body(block: Block, place: I32, split: I32, *addresses: I64) -> None:
        given = dict(zip(names, addresses, strict=True))
        absent = {item.name: None for item in fields(Operands) if item.name not in given}
        operands = Operands(**given, **absent)  # type: ignore[arg-type]
        attend(plan, block, place, split, operands)

    return launch_attention(
        body,
        list(arrays.values()),
        batch=plan.batch,
        kv_heads=plan.kv_heads,
        merging=plan.merging,
        shared_bytes=plan.shared.size,
    )


def _plan(query: SketchQuery, keys: PackedKeys, values: PackedValues, start: int) -> Plan:
    kv_heads, head_dim, bits = query.transform.shape
    layers, batch, _, tokens = keys.words.shape
    scale = None
    if isinstance(query.scale, np.ndarray) and (query.scale == query.scale[0]).all():
        scale = float(query.scale[0])
    return divide(
        layers=layers,
        batch=batch,
        kv_heads=kv_heads,
        groups=query.vectors.shape[2] // kv_heads,
        head_dim=head_dim,
        bits=bits,
        value_bits=values.bits,
        tokens=tokens,
        start=start,
        scale=scale,
        scaled=keys.scales is not None,
        signed=query.signed,
        variance=query.variance is not None,
        planes=query.planes,
        period=None if query.rope is None else query.rope.period,
        stacked_transform=query.prepared is not None,
    )


def _query_signs(query: SketchQuery) -> Int32[Array, "batch heads words"]:
    """Signs of the transformed queries, packed as those of keys are."""
    kv_heads = query.transform.shape[0]
    vectors = rearrange(query.vectors, "b 1 (k g) d -> b k g d", k=kv_heads)
    coefficients = jnp.einsum(
        "bkgd,kdc->bkgc",
        vectors.astype(jnp.float32),
        query.transform.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return pack_column(rearrange(coefficients >= 0, "b k g c -> b (k g) c"), 1)
