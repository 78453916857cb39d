"""The definition of attention over sketched keys and quantised values, in plain jax.numpy.

Every other implementation is tested against this one, which is itself tested against a float64
evaluation of the same codes. It is also what runs where no kernel does.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels.packing import (
    unpack_rows,
    unpack_scalar_pair,
    unpack_scalars,
    words_per_column,
)
from pallas_kernels.rotary import rotate
from pallas_kernels.sketch_attention.arguments import (
    BlockRope,
    PackedKeys,
    PackedValues,
    SketchQuery,
)
from pallas_kernels.sketch_attention.blocks import (
    BlockScores,
    BlockValues,
    attend_blocks,
    read_block,
)
from pallas_kernels.sketch_attention.partial import Partial

_EXACT = jax.lax.Precision.HIGHEST


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
    kv_heads = query.transform.shape[0]
    return attend_blocks(
        sketch_scores(query, keys, layer),
        packed_values(values, layer, query.vectors.shape[-1]),
        start=start,
        stop=stop,
        capacity=keys.words.shape[-1],
        kv_heads=kv_heads,
        query_shape=query.vectors.shape,
    )


def sketch_scores(query: SketchQuery, keys: PackedKeys, layer: Int32[Array, ""]) -> BlockScores:
    """Logits of the queries against any block of the sketched keys of one layer."""
    kv_heads, head_dim, bits = query.transform.shape
    vectors = rearrange(query.vectors.astype(jnp.float32), "b q (k g) d -> b k g q d", k=kv_heads)
    scale = rearrange(jnp.asarray(query.scale), "(k g) -> k g 1 1", k=kv_heads)

    def scores(
        first: Int32[Array, ""], length: int
    ) -> Float[Array, "batch kv_heads groups queries block"]:
        words = read_block(keys.words, layer, first, length, axis=3)
        signs = _signs(words, kv_heads, bits)
        if query.rope is None:
            logits = scale * _dot_signs(_coefficients(query, vectors), signs)
        else:
            relative = _block_relative(vectors, first, length, query.rope)
            logits = scale * _dot_signs_per_period(_coefficients(query, relative), signs)
        if keys.scales is not None:
            paired = read_block(keys.scales, layer, first // 2, length // 2, axis=3)
            norm = unpack_scalars(paired)[:, :, None, None]
            logits = logits * norm
            if query.variance is not None:
                variance = rearrange(query.variance, "b q (k g) -> b k g q 1", k=kv_heads)
                code_norm = _squared_code_norm(signs, query.planes)[:, :, None, None]
                logits = logits - variance * jnp.square(norm) * code_norm
        if query.rope is not None:
            mean = jnp.einsum("bkgqpd,kd->bkgqp", relative, query.rope.mean, precision=_EXACT)
            logits = logits + jnp.repeat(mean / head_dim**0.5, query.rope.period, axis=-1)
        return logits

    return scores


def packed_values(values: PackedValues, layer: Int32[Array, ""], head_dim: int) -> BlockValues:
    """Float32 values of any block of one layer: `zero + scale · code`."""

    def read(first: Int32[Array, ""], length: int) -> Float[Array, "batch kv_heads block head_dim"]:
        words = read_block(values.words, layer, first, length, axis=3)
        affine = read_block(values.affine, layer, first, length, axis=3)
        return _dequantise(words, affine, values.bits, head_dim)

    return read


def _dequantise(
    words: Int32[Array, "batch rows block"],
    affine: Int32[Array, "batch group_rows block"],
    bits: int,
    head_dim: int,
) -> Float[Array, "batch kv_heads block head_dim"]:
    per_head = rearrange(words, "b (k w) t -> b k w t", w=words_per_column(head_dim, bits))
    codes = unpack_rows(per_head, bits, head_dim).astype(jnp.float32)
    scale, zero = (
        rearrange(half, "b (k g) t -> b k g 1 t", k=codes.shape[1])
        for half in unpack_scalar_pair(affine)
    )
    grouped = rearrange(codes, "b k (g c) t -> b k g c t", g=scale.shape[2])
    return rearrange(zero + scale * grouped, "b k g c t -> b k t (g c)")


def _signs(
    words: Int32[Array, "batch rows block"], kv_heads: int, bits: int
) -> Float[Array, "batch kv_heads bits block"]:
    per_head = rearrange(words, "b (k w) t -> b k w t", k=kv_heads)
    return 2.0 * unpack_rows(per_head, 1, bits).astype(jnp.float32) - 1.0


def _coefficients(
    query: SketchQuery, vectors: Float[Array, "batch kv_heads *rows head_dim"]
) -> Float[Array, "batch kv_heads *rows bits"]:
    transform = query.transform.astype(jnp.float32)
    coefficients = jnp.einsum("bk...d,kdc->bk...c", vectors, transform, precision=_EXACT)
    return jnp.where(coefficients >= 0, 1.0, -1.0) if query.signed else coefficients


def _dot_signs(
    coefficients: Float[Array, "batch kv_heads groups queries bits"],
    signs: Float[Array, "batch kv_heads bits block"],
) -> Float[Array, "batch kv_heads groups queries block"]:
    return jnp.einsum("bkgqc,bkct->bkgqt", coefficients, signs, precision=_EXACT)


def _dot_signs_per_period(
    coefficients: Float[Array, "batch kv_heads groups queries periods bits"],
    signs: Float[Array, "batch kv_heads bits block"],
) -> Float[Array, "batch kv_heads groups queries block"]:
    per_period = rearrange(signs, "b k c (p t) -> b k c p t", p=coefficients.shape[-2])
    logits = jnp.einsum("bkgqpc,bkcpt->bkgqpt", coefficients, per_period, precision=_EXACT)
    return rearrange(logits, "b k g q p t -> b k g q (p t)")


def _block_relative(
    vectors: Float[Array, "batch kv_heads groups queries head_dim"],
    first: Int32[Array, ""],
    length: int,
    rope: BlockRope,
) -> Float[Array, "batch kv_heads groups queries periods head_dim"]:
    begin = first + rope.period * jnp.arange(length // rope.period, dtype=jnp.int32)
    return rotate(vectors[..., None, :], -begin, rope.frequencies)


def _squared_code_norm(
    signs: Float[Array, "batch kv_heads bits block"], planes: int
) -> Float[Array, "batch kv_heads block"]:
    if planes == 1:
        return jnp.full(signs.shape[:2] + signs.shape[3:], float(signs.shape[2]))
    # (2a + a')² = 5 + 4·a·a'
    sign, second = jnp.split(signs, 2, axis=2)
    return jnp.sum(5.0 + 4.0 * sign * second, axis=2)
