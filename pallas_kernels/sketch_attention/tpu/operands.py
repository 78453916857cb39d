"""Queries as the kernel reads them, computed by XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float32, Int8, Int32

from pallas_kernels.packing import pack_column
from pallas_kernels.sketch_attention.arguments import SketchQuery
from pallas_kernels.sketch_attention.tpu.plan import LANES, Plan

FACTOR, OFFSET, VARIANCE, INVERSE = range(4)
"""Columns of `row_constants`; the last is that of `block_rope`."""

LOG2_E = float(np.log2(np.e))

_EXACT = jax.lax.Precision.HIGHEST


class QueryOperands(NamedTuple):
    """What the scores of a grid step need besides the cache.

    Attributes:
        coefficients: of the queries of every head of a grid step; their shape depends on how they
            are multiplied.
        constants: what turns their products with bits into logits, `row_constants`.
    """

    coefficients: Array
    constants: Float32[Array, "batch kv_heads rows lanes"]


def query_operands(query: SketchQuery, plan: Plan) -> QueryOperands:
    """Operands of queries that do not change along the tokens."""
    vectors = rearrange(query.vectors[:, 0], "b (k g) d -> b k g d", k=plan.kv_heads)
    coefficients = jnp.einsum(
        "bkgd,kdc->bkgc",
        vectors.astype(jnp.float32),
        query.transform.astype(jnp.float32),
        precision=_EXACT,
    )
    padding = [(0, 0), (0, 0), (0, plan.rows - plan.groups), (0, 0)]
    coefficients = jnp.pad(coefficients, padding)
    if plan.method == "popcount":
        # Of `bits` products of signs, popcount counts those that differ.
        signs = pack_column(coefficients >= 0, 1)
        ones = jnp.ones(coefficients.shape[:-1], jnp.float32)
        return QueryOperands(signs, row_constants(query, plan, -2.0 * ones, -plan.bits * ones))
    if query.signed:
        coefficients = jnp.where(coefficients >= 0, 1.0, -1.0)
    whole, unit, total = quantise(coefficients, plan)
    # Bits are read as 0 and 1: Σ n·(2b - 1) = 2·Σ n·b - Σ n.
    constants = row_constants(query, plan, 2.0 * unit, total * unit)
    return QueryOperands(tile_rows(whole, plan), constants)


def largest_whole(planes: int) -> int:
    """The largest coefficient that fits into one signed byte, or into two."""
    return 127 if planes == 1 else 127 * 256 + 127


def signed_bytes(
    whole: Int32[Array, "*rows bits"], planes: int
) -> list[Int32[Array, "*rows bits"]]:
    """Integers as signed bytes, the high one first: `256·high + low`."""
    if planes == 1:
        return [whole]
    high = (whole + 128) >> 8
    return [high, whole - (high << 8)]


def arrange(
    numbers: Float32[Array, "*batch kv_heads rows bits"], placement: Float32[np.ndarray, "..."]
) -> Float32[Array, "*batch kv_heads rows contraction"]:
    """Numbers of each head's bits where these lie in the head's tile, and zeros.

    Args:
        numbers: in the order of the bits.
        placement: what to multiply them with: of as many heads as there are different ones.
    """
    # A product with zeros and powers of two is exact, and needs no copies of narrow arrays.
    alike = rearrange(numbers, "... (n k) r c -> ... n k r c", k=len(placement))
    placed = jnp.einsum("...krc,kcx->...krx", alike, placement, precision=_EXACT)
    return rearrange(placed, "... n k r x -> ... (n k) r x")


def quantise(
    coefficients: Float32[Array, "batch kv_heads rows bits"], plan: Plan
) -> tuple[
    Int32[Array, "batch kv_heads rows contraction"],
    Float32[Array, "batch kv_heads rows"],
    Float32[Array, "batch kv_heads rows"],
]:
    """Whole coefficients of what bits are unpacked to, their unit, and their sum over all bits."""
    powers = plan.powers
    placed = arrange(coefficients, plan.placement / powers)
    unit = jnp.max(jnp.abs(placed), axis=-1) / largest_whole(plan.query_planes)
    divisor = jnp.where(unit > 0, unit, 1.0)[..., None]
    whole = jnp.round(placed / divisor)
    repeated = np.tile(powers, (plan.kv_heads // len(powers), 1, 1))
    total = jnp.sum(whole * repeated, axis=-1)
    return whole.astype(jnp.int32), unit, total


def tile_rows(
    whole: Int32[Array, "batch kv_heads rows contraction"], plan: Plan
) -> Int8[Array, "batch tiles tile_rows contraction"]:
    """The rows that multiply each tile: ordered by head, by byte of the coefficient, by query."""
    parts = jnp.stack(signed_bytes(whole, plan.query_planes), axis=2).astype(jnp.int8)
    together = plan.key_tiles[0].heads
    missing = -plan.step_heads % together
    by_step = rearrange(parts, "b (s k) part r c -> b s k part r c", s=plan.steps)
    by_step = jnp.pad(by_step, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * 3)
    return rearrange(by_step, "b s (tile k) part r c -> b (s tile) (k part r) c", k=together)


def row_constants(
    query: SketchQuery,
    plan: Plan,
    factor: Float32[Array, "batch kv_heads rows"],
    offset: Float32[Array, "batch kv_heads rows"],
) -> Float32[Array, "batch kv_heads rows lanes"]:
    """What each query's products are multiplied with and reduced by, in powers of two.

    Args:
        query: whose scale and variance go into it.
        plan: of the call.
        factor: of the products, before the query's scale.
        offset: likewise.
    """
    padding = (0, plan.rows - plan.groups)
    scale = rearrange(jnp.asarray(query.scale), "(k g) -> k g", k=plan.kv_heads)
    scale = jnp.pad(scale.astype(jnp.float32) * LOG2_E, [(0, 0), padding])
    columns = [factor * scale, offset * scale]
    if query.variance is not None:
        variance = rearrange(query.variance[:, 0], "b (k g) -> b k g", k=plan.kv_heads)
        norm = plan.bits if plan.code_planes == 1 else 1
        variance = variance.astype(jnp.float32) * (LOG2_E * norm)
        columns.append(jnp.pad(variance, [(0, 0), (0, 0), padding]))
    stacked = jnp.stack(columns, axis=-1)
    return jnp.pad(stacked, [(0, 0)] * 3 + [(0, LANES - len(columns))])
