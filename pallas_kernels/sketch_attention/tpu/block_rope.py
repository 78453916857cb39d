"""Queries that are turned back by the position of each RoPE block.

A turn by the position of a block is that of the grid step's first token and then one of a few,
the same in all grid steps: two small tables instead of one row for every block. What a turned
query has in common with the mean key is a sum over channel pairs of cosines and sines, hence a
product with such a table too.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.rotary import Turn, turn
from pallas_kernels.sketch_attention.arguments import BlockRope, SketchQuery
from pallas_kernels.sketch_attention.tpu.key_tiles import SIGN_UNIT
from pallas_kernels.sketch_attention.tpu.operands import (
    INVERSE,
    LOG2_E,
    arrange,
    largest_whole,
    row_constants,
    signed_bytes,
)
from pallas_kernels.sketch_attention.tpu.plan import LANES, Plan

_EXACT = lax.Precision.HIGHEST
_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))


class RopeOperands(NamedTuple):
    """What the scores of a grid step need besides the cache. Arrays, or the refs to them.

    Attributes:
        vectors: queries, and the same with the halves of their channels exchanged.
        transforms: columns in the order of the bits of a head's tile, as the sum of two.
        mean: the mean key, to be multiplied with queries and with exchanged ones.
        first_turn: by the position of the first token of each grid step.
        turns: from there to each RoPE block, a row for every query.
        mean_turns: likewise, a column for every token.
    """

    vectors: Any  # Float32[Array, "batch kv_heads 2 rows head_dim"]
    transforms: Any  # BFloat16[Array, "kv_heads 2 head_dim contraction"]
    mean: Any  # Float32[Array, "kv_heads 2 head_dim"]
    first_turn: Any  # Float32[Array, "blocks 2 head_dim"]
    turns: Any  # Float32[Array, "2 periods_rows head_dim"]
    mean_turns: Any  # Float32[Array, "head_dim block"]


def rope_operands(
    query: SketchQuery, rope: BlockRope, plan: Plan
) -> tuple[RopeOperands, Float32[Array, "batch kv_heads rows lanes"]]:
    """The operands, and `row_constants`."""
    vectors = rearrange(query.vectors[:, 0], "b (k g) d -> b k g d", k=plan.kv_heads)
    padding = [(0, 0), (0, 0), (0, plan.rows - plan.groups), (0, 0)]
    vectors = jnp.pad(vectors.astype(jnp.float32), padding)
    transform = query.transform.astype(jnp.float32)
    # A coefficient of a turned query is at most the product of two lengths.
    length = jnp.linalg.norm(vectors, axis=-1)
    longest = jnp.max(jnp.linalg.norm(transform, axis=1), axis=-1)
    unit = length * longest[:, None] / largest_whole(plan.query_planes)
    inverse = jnp.where(unit > 0, 1.0 / jnp.where(unit > 0, unit, 1.0), 0.0)
    constants = row_constants(query, plan, unit / SIGN_UNIT, jnp.zeros_like(unit))
    constants = constants.at[..., INVERSE].set(inverse)

    assert plan.period is not None
    period = jnp.arange(plan.periods, dtype=jnp.int32) * plan.period
    first = jnp.arange(plan.blocks, dtype=jnp.int32) * plan.block
    frequencies = rope.frequencies.astype(jnp.float32)
    turns = turn(period, frequencies)
    ahead, behind = jnp.split(rope.mean.astype(jnp.float32), 2, axis=-1)
    mean = [jnp.concatenate([ahead, ahead], -1), jnp.concatenate([behind, -behind], -1)]
    operands = RopeOperands(
        vectors=jnp.stack([vectors, _exchange(vectors)], axis=2),
        transforms=jnp.stack(_as_two(arrange(transform, plan.placement)), axis=1),
        mean=jnp.stack(mean, axis=1) * (LOG2_E / plan.head_dim**0.5),
        first_turn=jnp.stack(_factors(turn(first, frequencies)), axis=1),
        turns=jnp.repeat(jnp.stack(_factors(turns)), plan.rows, axis=1),
        mean_turns=jnp.repeat(jnp.concatenate([*turns], axis=-1).T, plan.period, axis=1),
    )
    return operands, constants


def _exchange(x: Float32[Array, "*rows head_dim"]) -> Float32[Array, "*rows head_dim"]:
    return jnp.roll(x, x.shape[-1] // 2, axis=-1)


def _factors(angle: Turn) -> tuple[Float32[Array, "*rows head_dim"], ...]:
    """What turns back: `turned = x · first + exchanged x · second`."""
    return (
        jnp.concatenate([angle.cos, angle.cos], axis=-1),
        jnp.concatenate([angle.sin, -angle.sin], axis=-1),
    )


def turned_products(
    operands: RopeOperands,
    constants: list[Float32[Array, "rows lanes"]],
    words: Int32[Array, "key_rows tokens"],
    plan: Plan,
) -> list[Int32[Array, "rows tokens"]]:
    """For each head of the grid step, `-64·Σ n·c` of its whole coefficients n and signs c."""
    whole = [
        _coefficients(operands, head, own[:, INVERSE : INVERSE + 1], plan)
        for head, own in enumerate(constants)
    ]
    assert plan.period is not None
    periods = LANES // plan.period
    rows = periods * plan.rows
    lane = lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)
    parts: list[list[Array]] = [[] for _ in whole]
    for tile in plan.key_tiles:
        signs = tile.unpack_signs(words)
        for column in range(plan.block // LANES):
            heads = range(tile.first_head, tile.first_head + tile.heads)
            left = [
                part
                for head in heads
                for part in signed_bytes(
                    whole[head][column * rows : (column + 1) * rows, : tile.contraction],
                    plan.query_planes,
                )
            ]
            products = lax.dot_general(
                jnp.concatenate(left).astype(jnp.int8),
                signs[:, column * LANES : (column + 1) * LANES],
                _ROWS_BY_COLUMNS,
                preferred_element_type=jnp.int32,
            )
            for index, head in enumerate(heads):
                first = index * plan.query_planes * rows
                found = products[first : first + rows]
                if plan.query_planes == 2:
                    found = (found << 8) + products[first + rows : first + 2 * rows]
                chosen = found[: plan.rows]
                for period in range(1, periods):
                    own = found[period * plan.rows : (period + 1) * plan.rows]
                    chosen = jnp.where(lane >= period * plan.period, own, chosen)
                parts[head].append(chosen)
    return [jnp.concatenate(columns, axis=1) for columns in parts]


def _coefficients(
    operands: RopeOperands, head: int, inverse: Float32[Array, "rows 1"], plan: Plan
) -> Int32[Array, "periods_rows contraction"]:
    """Of the queries of one head in all RoPE blocks of the grid step, as whole numbers."""
    vector, exchanged = _first_turned(operands, head)

    def repeat(rows: Array) -> Array:
        return jnp.concatenate([rows] * plan.periods)

    turned = repeat(vector) * operands.turns[0] + repeat(exchanged) * operands.turns[1]
    high, low = _as_two(turned)
    matrix, rest = operands.transforms[head, 0], operands.transforms[head, 1]
    found = _multiply(high, matrix) + (_multiply(high, rest) + _multiply(low, matrix))
    return jnp.round(found * repeat(inverse)).astype(jnp.int32)


def _as_two(x: Float32[Array, "*shape"]) -> list[BFloat16[Array, "*shape"]]:
    """Numbers and what is missing from them: together 16 bits, at half the cost of float32."""
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def _multiply(
    rows: BFloat16[Array, "rows head_dim"], columns: BFloat16[Array, "head_dim columns"]
) -> Float32[Array, "rows columns"]:
    return lax.dot_general(rows, columns, _ROWS_BY_COLUMNS, preferred_element_type=jnp.float32)


def mean_logits(operands: RopeOperands, plan: Plan) -> list[Float32[Array, "rows tokens"]]:
    """What each head's turned queries have in common with its mean key."""
    pairs = []
    for head in range(plan.step_heads):
        vector, exchanged = _first_turned(operands, head)
        mean = operands.mean[head]
        pairs.append(vector * mean[:1] + exchanged * mean[1:])
    logits = lax.dot_general(
        jnp.concatenate(pairs),
        operands.mean_turns[...],
        _ROWS_BY_COLUMNS,
        precision=_EXACT,
        preferred_element_type=jnp.float32,
    )
    return [logits[first : first + plan.rows] for first in range(0, len(logits), plan.rows)]


def _first_turned(operands: RopeOperands, head: int) -> tuple[Array, Array]:
    """A head's queries turned to the grid step's first token, and the same exchanged."""
    vector, exchanged = operands.vectors[0, head, 0], operands.vectors[0, head, 1]
    first, second = operands.first_turn[0, :1], operands.first_turn[0, 1:]
    return vector * first + exchanged * second, exchanged * first - vector * second
