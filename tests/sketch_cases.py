"""What every implementation of sketch attention is tested on, and the answers in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import float64
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.sketch_attention import BlockRope, PackedKeys, PackedValues, SketchQuery
from pallas_kernels.sketch_attention.arguments import PreparedTransform
from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import prepare_transform

HEAD_DIMS = (8, 32, 48, 64, 80, 96, 128, 256)


@dataclass(frozen=True)
class SketchCase:
    """One random cache and the queries that read it."""

    head_dim: int = 64
    bits: int = 64
    groups: int = 2
    kv_heads: int = 2
    capacity: int = 128
    batch: int = 2
    queries: int = 1
    layers: int = 1
    layer: int = 0
    start: int = 0
    stops: tuple[int, ...] = ()
    """Stops in row-major order, repeated as needed; random ones where there are none."""
    value_bits: int = 4
    scalars: bool = True
    signed: bool = False
    variance: bool = False
    planes: int = 1
    period: int | None = None
    dtype: str = "float32"
    outliers: bool = False
    """Whether some values have scales a thousand times larger than others."""
    opposed: bool = False
    """Whether keys point away from the first query of each KV head: its logits are far below 0."""
    weighted: bool = False
    """Whether bits count for powers of two, as those of a transform code do."""
    as_decoded: bool = False
    """Whether transforms are prepared and the factor is a constant, as in a decoder's steps."""
    seed: int = 0


# Compilation takes most of the time of a test: cases that differ in data alone share it.
WINDOWED = SketchCase(batch=4, variance=True, start=4)
LAYERED = SketchCase(layers=3, period=64, capacity=256)

CASES = {
    "one plane with its scalar": SketchCase(head_dim=128, bits=128),
    "as published: 256 signs and a signed query": SketchCase(
        head_dim=128, bits=256, scalars=False, signed=True
    ),
    "signed query of few bits": SketchCase(head_dim=8, bits=32, scalars=False, signed=True),
    "variance of one plane": WINDOWED,
    "rows that see nothing": replace(WINDOWED, stops=(0, -60, 4, 5)),
    "no row sees anything": replace(WINDOWED, stops=(0, -1, 4, 3)),
    "stops beyond the capacity": replace(WINDOWED, stops=(129, 128, 5000, 5)),
    "variance of two planes": replace(WINDOWED, bits=128, planes=2),
    "two planes of a narrow head": SketchCase(head_dim=8, bits=32, variance=True, planes=2),
    "two planes of 96 channels": SketchCase(head_dim=96, bits=192, variance=True, planes=2),
    "linear decoder without scalars": SketchCase(bits=96, scalars=False),
    "64 bits of 128 channels": SketchCase(head_dim=128, bits=64),
    "2-bit values": SketchCase(value_bits=2),
    "3-bit values of 8 channels": SketchCase(head_dim=8, bits=32, value_bits=3),
    "3-bit values of 80 channels": SketchCase(head_dim=80, bits=96, value_bits=3),
    "48 channels": SketchCase(head_dim=48, bits=64),
    "256 channels": SketchCase(head_dim=256, bits=256, kv_heads=1),
    "one query head per KV head": SketchCase(groups=1, kv_heads=4),
    "sixteen query heads on one KV head": SketchCase(groups=16, kv_heads=1),
    "three query heads on three KV heads": SketchCase(groups=3, kv_heads=3, head_dim=32, bits=32),
    "several queries": SketchCase(queries=5, batch=3, capacity=256),
    "the first layer, period 64": LAYERED,
    "a middle layer, period 64": replace(LAYERED, layer=1),
    "the last layer, period 64": replace(LAYERED, layer=2),
    "period 128": SketchCase(period=128, capacity=384, start=4),
    "period 32 without scalars": SketchCase(period=32, scalars=False, queries=3),
    "period 32, variance of two planes": SketchCase(
        period=32, capacity=256, bits=128, variance=True, planes=2, groups=1
    ),
    "a block and 128 tokens": SketchCase(
        capacity=1152, head_dim=32, bits=32, batch=3, stops=(1152, 1025, 1024)
    ),
    "start inside the second block": SketchCase(
        capacity=1152, head_dim=32, bits=32, batch=3, start=1030, stops=(1152, 1031, 1030)
    ),
    "two blocks and 128 tokens, period 32": SketchCase(
        capacity=2176, head_dim=32, bits=32, batch=4, stops=(2176, 2049, 1500, 3), period=32
    ),
    "edges of a block": SketchCase(batch=6, capacity=256, stops=(0, 1, 127, 128, 129, 256)),
    "the last token only": SketchCase(capacity=256, start=255, stops=(256, 255)),
    "outlier scales of values": replace(WINDOWED, outliers=True),
    "logits far below zero": replace(WINDOWED, opposed=True),
    "bfloat16 queries": SketchCase(dtype="bfloat16", variance=True),
    "bfloat16 queries, period 32": SketchCase(dtype="bfloat16", period=32),
}

LONG = SketchCase(head_dim=128, bits=128, groups=4, capacity=4096, start=4, stops=(4096, 3001))
TURNED = SketchCase(head_dim=128, bits=128, capacity=1024, period=32, start=4, stops=(1000, 37))

KERNEL_CASES = {
    "long rows": LONG,
    "long rows, outlier scales": replace(LONG, outliers=True),
    "long rows, logits far below zero": replace(LONG, opposed=True),
    "256 bits and 2-bit values": replace(LONG, bits=256, value_bits=2),
    "one head of many": replace(LONG, groups=1, kv_heads=8),
    "sixteen heads": replace(LONG, groups=16),
    "eleven heads": replace(LONG, groups=11),
    "64 channels": replace(LONG, head_dim=64, bits=64),
    "96 channels": replace(LONG, head_dim=96, bits=96),
    "256 channels": replace(LONG, head_dim=256, bits=256),
    "3-bit values": replace(LONG, value_bits=3),
    "3-bit values of 64 channels": replace(LONG, head_dim=64, bits=64, value_bits=3),
    "2-bit values of 64 channels": replace(LONG, head_dim=64, bits=64, value_bits=2),
    "3-bit values of 96 channels": replace(LONG, head_dim=96, bits=96, value_bits=3),
    "2-bit values of 96 channels": replace(LONG, head_dim=96, bits=96, value_bits=2),
    "3-bit values of 256 channels": replace(LONG, head_dim=256, bits=256, value_bits=3),
    "signed query of 128 bits": replace(LONG, scalars=False, signed=True),
    "one row": replace(LONG, batch=1, stops=(4096,)),
    "no scalars": replace(LONG, scalars=False),
    "as a decoder passes it": replace(LONG, layers=2, layer=1, weighted=True, as_decoded=True),
    "as a decoder passes it, period 32": replace(
        TURNED, layers=2, layer=1, weighted=True, as_decoded=True
    ),
    "period 32 of two heads": TURNED,
    "period 32 of four heads": replace(TURNED, groups=4),
    "period 32 of eight heads": replace(TURNED, groups=8),
    "period 32 of sixteen heads": replace(TURNED, groups=16),
    "period 32, 256 channels, sixteen heads": replace(
        TURNED, groups=16, kv_heads=1, head_dim=256, bits=256
    ),
    "period 32 of 96 channels": replace(TURNED, head_dim=96, bits=96),
    "period 64 of one head": replace(TURNED, groups=1, period=64, stops=(1000, 137)),
    "period 128": replace(TURNED, period=128),
    "period 32, logits far below zero": replace(TURNED, opposed=True),
    "period 32, two planes and their variance": replace(
        TURNED, bits=256, planes=2, variance=True, value_bits=2
    ),
}
"""Shapes that kernels are made for, longer than plain jax.numpy need be tested with."""


@st.composite
def cases(draw: st.DrawFn, head_dims: Sequence[int] = HEAD_DIMS, queries: int = 3) -> SketchCase:
    """Any cache: each feature in any combination that has a meaning; up to so many queries."""
    head_dim = draw(st.sampled_from(head_dims))
    planes = draw(st.sampled_from((1, 2)))
    bits = 32 * draw(st.integers(1, 8))
    scalars = planes == 2 or draw(st.booleans())
    capacity = 128 * draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    return SketchCase(
        head_dim=head_dim,
        bits=bits,
        groups=draw(st.integers(1, 16)),
        kv_heads=draw(st.integers(1, 4)),
        capacity=capacity,
        batch=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, queries)),
        layers=layers,
        layer=draw(st.integers(0, layers - 1)),
        start=draw(st.integers(0, capacity)),
        stops=tuple(draw(st.lists(st.integers(-70, capacity + 70), max_size=9))),
        value_bits=draw(st.sampled_from((4, 3, 2))),
        scalars=scalars,
        signed=not scalars and draw(st.booleans()),
        variance=scalars and draw(st.booleans()),
        planes=planes,
        period=draw(st.sampled_from((None, 128, 64, 32))),
        dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        outliers=draw(st.booleans()),
        opposed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class Arguments(NamedTuple):
    """Arguments of `sketch_attention`."""

    query: SketchQuery
    keys: PackedKeys
    values: PackedValues
    layer: jnp.ndarray
    start: int
    stop: jnp.ndarray


class Answer(NamedTuple):
    """Float64 output `[batch, queries, heads, head_dim]` and its log-sum-exp."""

    output: np.ndarray
    lse: np.ndarray


def build(case: SketchCase) -> tuple[Arguments, Answer]:
    """Draws codes and queries, packs them, and attends to the codes themselves in float64."""
    rng = np.random.default_rng(case.seed)
    heads = case.kv_heads * case.groups
    stored = (case.layers, case.batch, case.kv_heads, case.capacity)

    bits = rng.integers(0, 2, (*stored, case.bits))
    codes = rng.integers(0, 2**case.value_bits, (*stored, case.head_dim))
    scales, value_scale = (_bfloat16(rng.uniform(0.1, 2.0, stored)) for _ in range(2))
    zero = _bfloat16(rng.normal(size=stored))
    if case.outliers:
        value_scale = np.where(rng.random(stored) < 0.1, _bfloat16(1000 * value_scale), value_scale)

    vectors = rng.normal(size=(case.batch, case.queries, heads, case.head_dim))
    transform = rng.normal(size=(case.kv_heads, case.head_dim, case.bits)) / case.bits**0.5
    if case.signed:
        # Whole numbers project without rounding, so that both sides see the same signs and zeros.
        vectors, transform = (np.round(2 * vectors), np.round(transform * case.bits**0.5))
    if case.opposed:
        first = vectors[:, 0, :: case.groups]
        opposite = np.einsum("bkd,kdc->bkc", first, transform)[:, :, None] < 0
        bits = np.where(rng.random(bits.shape) < 0.9, opposite, bits)
    vectors = vectors.astype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float32)
    transform = transform.astype(np.float32)
    if case.weighted:
        transform = transform * np.float32(2.0) ** -(np.arange(case.bits) % 4)
    scale = rng.uniform(0.5, 2.0, 1 if case.as_decoded else heads) / case.head_dim**0.5
    scale = np.broadcast_to(scale, heads)
    if case.signed:
        scale = scale * case.head_dim / case.bits
    scale = scale.astype(np.float32)
    energy = rng.uniform(0.0, 1.0, (case.batch, case.queries, heads)) / case.bits
    variance = energy.astype(np.float32) if case.variance else None
    # Few mantissa bits keep the float32 angles exact, as the comparison is not about them.
    frequencies = _bfloat16(
        100.0 ** -np.linspace(0.0, 1.0, case.head_dim // 2, endpoint=False)
    ).astype(np.float32)
    mean = rng.normal(size=(case.kv_heads, case.head_dim)).astype(np.float32)
    stops = case.stops or tuple(rng.integers(0, case.capacity + 1, case.batch * case.queries))
    stop = np.resize(np.asarray(stops, np.int32), (case.batch, case.queries))

    rope = None
    if case.period is not None:
        rope = BlockRope(jnp.asarray(frequencies), jnp.asarray(mean), case.period)
    arguments = Arguments(
        SketchQuery(
            jnp.asarray(vectors),
            jnp.asarray(transform),
            scale if case.as_decoded else jnp.asarray(scale),
            variance=None if variance is None else jnp.asarray(variance),
            rope=rope,
            prepared=_prepared(case, transform) if case.as_decoded else None,
            signed=case.signed,
            planes=case.planes,
        ),
        PackedKeys(_rows(bits, 1), _paired(scales) if case.scalars else None),
        PackedValues(
            _rows(codes, case.value_bits), _high_and_low(value_scale, zero), case.value_bits
        ),
        jnp.int32(case.layer),
        case.start,
        jnp.asarray(stop),
    )

    signs = 2.0 * bits[case.layer] - 1.0
    s = scales[case.layer].astype(np.float64) if case.scalars else np.ones(stored[1:])
    values = (
        zero[case.layer].astype(np.float64)[..., None]
        + value_scale[case.layer].astype(np.float64)[..., None] * codes[case.layer]
    )
    code = signs if case.planes == 1 else 2 * signs[..., : case.bits // 2]
    code = code if case.planes == 1 else code + signs[..., case.bits // 2 :]
    code_norm = np.square(code).sum(axis=-1)
    position = np.arange(case.capacity)
    output = np.zeros((case.batch, case.queries, heads, case.head_dim))
    lse = np.zeros((case.batch, case.queries, heads))
    for b, t, h in np.ndindex(lse.shape):
        k = h // case.groups
        q = vectors[b, t, h].astype(np.float64)
        relative = np.broadcast_to(q, (case.capacity, case.head_dim))
        if case.period is not None:
            relative = float64.rotate(
                relative, -(position // case.period * case.period), frequencies
            )
        read = relative @ transform[k].astype(np.float64)
        if case.signed:
            read = np.where(read >= 0, 1.0, -1.0)
        logits = scale[h].astype(np.float64) * s[b, k] * (read * signs[b, k]).sum(axis=-1)
        if variance is not None:
            logits -= variance[b, t, h].astype(np.float64) * s[b, k] ** 2 * code_norm[b, k]
        if case.period is not None:
            logits += relative @ mean[k].astype(np.float64) / case.head_dim**0.5
        visible = (position >= case.start) & (position < stop[b, t])
        output[b, t, h], lse[b, t, h] = float64.softmax_attention(logits, visible, values[b, k])
    return arguments, Answer(output, lse)


def _prepared(case: SketchCase, transform: np.ndarray) -> PreparedTransform:
    """Transforms of all layers, of which the others are not to be read."""
    others = np.full((case.layers, *transform.shape), 100.0, np.float32)
    others[case.layer] = transform
    return prepare_transform(jnp.asarray(others))


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16)


def _rows(codes: np.ndarray, width: int) -> jnp.ndarray:
    """`[layers, batch, kv_heads, tokens, fields]` to words `[layers, batch, rows, tokens]`."""
    words = np.moveaxis(float64.pack(codes, width), -1, -2)
    return jnp.asarray(words.reshape(*words.shape[:2], -1, words.shape[-1]))


def _paired(scales: np.ndarray) -> jnp.ndarray:
    """One scalar per token as two rows of half the length."""
    layers, batch, kv_heads, tokens = scales.shape
    rows = np.zeros((layers, batch, 2 * kv_heads, tokens // 2), np.uint16)
    for n in range(tokens):
        rows[:, :, n % 128 // 64 :: 2, n // 128 * 64 + n % 64] = scales[..., n].view(np.uint16)
    return jnp.asarray(rows)


def _high_and_low(high: np.ndarray, low: np.ndarray) -> jnp.ndarray:
    """Two bfloat16 scalars in one word."""
    upper, lower = (half.view(np.uint16).astype(np.uint32) for half in (high, low))
    return jnp.asarray((upper << 16 | lower).view(np.int32))
