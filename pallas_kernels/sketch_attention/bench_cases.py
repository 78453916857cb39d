"""What the bench runs on: shapes, presets in the kernel's terms, random caches, and answers."""

from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from pallas_kernels.packing import (
    TOKEN_BLOCK,
    pack_scalar_pair,
    to_storage,
    unpack_rows,
    unpack_scalar_pair,
    unpack_scalars,
    words_per_column,
)
from pallas_kernels.sketch_attention.arguments import (
    BlockRope,
    PackedKeys,
    PackedValues,
    SketchQuery,
)
from pallas_kernels.sketch_attention.choice import prepare_transform

_THETA = 500_000.0
_LOGIT_DEVIATION = 2.0


class Shape(NamedTuple):
    """One decode step of one layer.

    Attributes:
        batch: sequences.
        kv_heads: KV heads.
        groups: query heads that read one KV head.
        tokens: capacity of each sequence, a multiple of 128.
        head_dim: channels of a head, a multiple of 32.
    """

    batch: int
    kv_heads: int
    groups: int
    tokens: int
    head_dim: int = 128

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """A shape's name, or its numbers with commas; the last, the head dimension, may be absent.

        Raises:
            ValueError: neither; or a kernel could not take the numbers.
        """
        if text in SHAPES:
            return SHAPES[text]
        numbers = text.split(",")
        if len(numbers) not in (4, 5) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ValueError(
                f"shape {text!r} is neither BATCH,KV_HEADS,GROUPS,TOKENS[,HEAD_DIM] "
                f"nor one of {', '.join(SHAPES)}"
            )
        shape = cls(*map(int, numbers))
        if shape.tokens % TOKEN_BLOCK or shape.head_dim % 32:
            raise ValueError(
                f"shape {text!r}: tokens must be a multiple of {TOKEN_BLOCK}, "
                "and the head dimension of 32"
            )
        return shape

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.groups

    def __str__(self) -> str:
        return ",".join(map(str, self))


SHAPES = MappingProxyType(
    {
        "batch": Shape(8, 8, 4, 32768),
        "many-heads": Shape(16, 32, 1, 8192),
        "long": Shape(1, 8, 4, 131072),
        "one-short": Shape(1, 8, 4, 16384),
        "batch-short": Shape(8, 8, 4, 4096),
        "batch-g8": Shape(8, 8, 8, 32768),
        "batch-g1": Shape(8, 8, 1, 32768),
        "batch-d64": Shape(8, 8, 4, 32768, 64),
    }
)
"""The shapes that are measured unless others are asked for."""


@dataclass(frozen=True)
class Preset:
    """How keys and values are stored: a cache preset as the kernel sees it.

    Attributes:
        code: "transform" where the decoder's columns span powers of two, "signs" where they are
            alike, "planes" where the second half of the bits weighs half as much as the first.
        value_bits: of a value's code.
        rate: sketch bits per channel, rounded up to whole words.
        bits: sketch bits where they do not depend on the head dimension.
        scaled: whether each key has a scalar.
        signed: whether the query is reduced to signs.
        period: the RoPE period; None keeps the full RoPE.
        variance: whether half the variance of a logit is taken off it.
    """

    code: Literal["transform", "signs", "planes"]
    value_bits: int
    rate: float = 1.0
    bits: int | None = None
    scaled: bool = True
    signed: bool = False
    period: int | None = None
    variance: bool = False

    def sketch_bits(self, head_dim: int) -> int:
        """Sign bits of a key."""
        return self.bits or 32 * ceil(round(self.rate * head_dim / 32, 6))

    def bytes_per_token(self, head_dim: int) -> int:
        """Bytes that a kernel has to read for one token of one KV head."""
        key = self.sketch_bits(head_dim) // 8 + 2 * self.scaled
        return key + 4 * words_per_column(head_dim, self.value_bits) + 4


PRESETS = MappingProxyType(
    {
        "h1b": Preset("transform", 4),
        "h1b-v3": Preset("transform", 3),
        "h1b-v2": Preset("transform", 2),
        "h1b-p32": Preset("transform", 4, period=32),
        "h1b-p32-v2": Preset("transform", 2, period=32),
        "h1b-256-v2": Preset("transform", 2, rate=2.0),
        "h1b-64-p32-v2": Preset("transform", 2, rate=0.5, period=32),
        "h1b-unscaled": Preset("transform", 4, scaled=False),
        "h1b-unscaled-p32": Preset("transform", 4, scaled=False, period=32),
        "h1b-signs": Preset("signs", 4, variance=True),
        "h1b-signs-v3": Preset("signs", 3, variance=True),
        "h1b-signs-v2": Preset("signs", 2, variance=True),
        "h1b-2plane": Preset("planes", 4, rate=2.0, variance=True),
        "h1b-2plane-v2": Preset("planes", 2, rate=2.0, variance=True),
        "h1b-paper": Preset("signs", 4, bits=256, scaled=False, signed=True),
    }
)
"""The cache presets that run on this kernel, by their names in the library."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Random arguments of several calls; the call `i` reads layer `i % layers`.

    Attributes:
        keys: sketches of all layers.
        values: value codes of all layers.
        queries: of each call, with the transform of its layer. Transforms are prepared, as those
            of a model are once for many steps and layers.
        layers: the number of each layer, on the device.
        stop: one past the last token that each row sees, the same in all calls.
    """

    keys: PackedKeys
    values: PackedValues
    queries: tuple[SketchQuery, ...]
    layers: tuple[Int32[Array, ""], ...]
    stop: Int32[Array, "batch 1"]


def stops(shape: Shape, *, ragged: bool, seed: int) -> np.ndarray:
    """How many tokens each row sees: all, or between half of them and all, `[batch]`."""
    if not ragged:
        return np.full(shape.batch, shape.tokens, np.int32)
    rng = np.random.default_rng(seed)
    return rng.integers(shape.tokens // 2, shape.tokens + 1, shape.batch).astype(np.int32)


def random_inputs(
    rng: Key[Array, ""],
    stop: np.ndarray,
    *,
    shape: Shape,
    preset: Preset,
    layers: int,
    calls: int,
) -> Inputs:
    """Random codes, and queries whose logits have a standard deviation of about 2.

    Args:
        rng: the seed.
        stop: one past the last token that each row sees, `[batch]`.
        shape: of one call.
        preset: how keys and values are stored.
        layers: layers stored.
        calls: queries made.
    """
    bits = preset.sketch_bits(shape.head_dim)
    stored = (layers, shape.batch, shape.kv_heads)
    rngs = iter(jax.random.split(rng, 8))

    def words(per_head: int) -> Int32[Array, "layers batch rows tokens"]:
        rows = (layers, shape.batch, shape.kv_heads * per_head, shape.tokens)
        return jax.lax.bitcast_convert_type(jax.random.bits(next(rngs), rows), jnp.int32)

    scales = None
    if preset.scaled:
        paired = (layers, shape.batch, 2 * shape.kv_heads, shape.tokens // 2)
        scales = to_storage(_uniform(next(rngs), paired, 0.5, 1.5))
    step = _uniform(next(rngs), (*stored, shape.tokens), 0.1, 0.3)
    middle = jnp.bfloat16(0.5 * (2**preset.value_bits - 1))
    weight = _weights(preset, bits)
    energy = float(np.sum(np.square(weight)))
    heads = (calls, shape.batch, 1, shape.heads)
    vectors = jax.random.normal(next(rngs), (*heads, shape.head_dim))
    transforms = jax.random.normal(next(rngs), (layers, shape.kv_heads, shape.head_dim, bits))
    transforms = transforms * weight
    if preset.signed:
        # Whole numbers are read without rounding, so that no sign depends on it.
        vectors, transforms = jnp.round(2 * vectors), jnp.round(2 * transforms)
    vectors = vectors.astype(jnp.bfloat16).astype(jnp.float32)
    variances = jax.random.uniform(next(rngs), heads) * 0.5 / energy
    means = 0.3 * jax.random.normal(next(rngs), (calls, shape.kv_heads, shape.head_dim))
    read = bits if preset.signed else shape.head_dim * energy
    prepared = None if preset.signed else prepare_transform(transforms)

    def query(call: int) -> SketchQuery:
        rope = None
        if preset.period is not None:
            rope = BlockRope(_frequencies(shape.head_dim), means[call], preset.period)
        return SketchQuery(
            vectors[call],
            transforms[call % layers],
            jnp.full(shape.heads, _LOGIT_DEVIATION / read**0.5, jnp.float32),
            variance=variances[call] if preset.variance else None,
            rope=rope,
            signed=preset.signed,
            planes=2 if preset.code == "planes" else 1,
            prepared=prepared,
        )

    return Inputs(
        PackedKeys(words(bits // 32), scales),
        PackedValues(
            words(words_per_column(shape.head_dim, preset.value_bits)),
            pack_scalar_pair(step, -middle * step),
            preset.value_bits,
        ),
        tuple(query(call) for call in range(calls)),
        tuple(jnp.int32(layer) for layer in range(layers)),
        jnp.asarray(stop)[:, None],
    )


def exact_answer(inputs: Inputs, call: int, row: int, head: int) -> np.ndarray:
    """The output of one query head of one row in float64, from the stored codes themselves."""
    query, layer = inputs.queries[call], call % len(inputs.layers)
    kv_heads, head_dim, bits = query.transform.shape
    kv_head = head // (query.vectors.shape[2] // kv_heads)
    stop = int(inputs.stop[row, 0])
    seen = -(-stop // TOKEN_BLOCK) * TOKEN_BLOCK

    def rows(array: Array) -> Array:
        return array[layer, row].reshape(kv_heads, -1, array.shape[-1])[kv_head, :, :seen]

    code = np.asarray(unpack_rows(rows(inputs.keys.words), 1, bits)).astype(np.int8)
    signs = 2.0 * code - 1.0
    scale = np.ones(seen)
    if inputs.keys.scales is not None:
        paired = inputs.keys.scales[layer, row, 2 * kv_head : 2 * kv_head + 2]
        scale = _float64(unpack_scalars(paired))[0, :seen]
    step, zero = map(_float64, unpack_scalar_pair(rows(inputs.values.affine)))
    codes = np.asarray(unpack_rows(rows(inputs.values.words), inputs.values.bits, head_dim))
    values = zero + step * codes

    period = seen if query.rope is None else query.rope.period
    vector = _float64(query.vectors[row, 0, head])
    relative = np.broadcast_to(vector, (seen // period, head_dim))
    if query.rope is not None:
        relative = _turn_back(relative, period, _float64(query.rope.frequencies))
    read = relative @ _float64(query.transform[kv_head])
    if query.signed:
        read = np.where(read >= 0, 1.0, -1.0)
    per_block = signs.reshape(bits, -1, period).transpose(1, 0, 2)
    logits = float(query.scale[head]) * scale * (read[:, None] @ per_block).reshape(seen)
    if query.variance is not None:
        sign, second = np.split(signs, 2)
        norm = (5 + 4 * sign * second).sum(axis=0) if query.planes == 2 else bits
        logits -= float(query.variance[row, 0, head]) * scale**2 * norm
    if query.rope is not None:
        common = relative @ _float64(query.rope.mean[kv_head]) / head_dim**0.5
        logits += np.repeat(common, period)
    weights = np.where(np.arange(seen) < stop, np.exp(logits - logits[:stop].max()), 0.0)
    return values @ weights / weights.sum()


def _uniform(rng: Key[Array, ""], shape: tuple[int, ...], low: float, high: float) -> Array:
    return jax.random.uniform(rng, shape, jnp.bfloat16, low, high)


def _weights(preset: Preset, bits: int) -> np.ndarray:
    """How much each bit weighs in a key."""
    if preset.code == "transform":
        return np.float32(2.0) ** -(np.arange(bits) % 4).astype(np.float32)
    if preset.code == "planes":
        return np.repeat(np.asarray([2, 1], np.float32), bits // 2)
    return np.ones(bits, np.float32)


def _frequencies(head_dim: int) -> Float[Array, "half_dim"]:
    """RoPE's, rounded so far that float32 angles are exact: the bench measures no angles."""
    exact = _THETA ** -np.linspace(0.0, 1.0, head_dim // 2, endpoint=False)
    return jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32)


def _turn_back(vectors: np.ndarray, period: int, frequencies: np.ndarray) -> np.ndarray:
    """Block i's vector, turned back by the position `i·period` where the block begins."""
    angle = -period * np.arange(len(vectors))[:, None] * frequencies
    first, second = np.split(vectors, 2, axis=-1)
    turned = (first + 1j * second) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _float64(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
