"""Merges the partial attentions of the splits in one small launch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.launch import WARPS, Block, launch
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, loop, select
from pallas_kernels.mosaic_gpu.softmax import LOG2_E, LOG_2

_LANES = 32
_AT_ONCE = 4
"""Splits that a warp reads at once."""


def combine(
    output: Float32[Array, "batch heads splits head_dim"],
    lse: Float32[Array, "batch heads splits"],
) -> tuple[Float32[Array, "batch heads head_dim"], Float32[Array, "batch heads"]]:
    """The attention over all splits, and its log-sum-exp; 0 and -inf where nothing was seen."""
    batch, heads, splits, head_dim = output.shape
    if splits == 1:
        return output[:, :, 0], lse[:, :, 0]
    results = [
        jax.ShapeDtypeStruct((batch, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads), jnp.float32),
    ]
    padded = -(-splits // (WARPS * _AT_ONCE)) * (WARPS * _AT_ONCE)

    def body(block: Block, parts: I64, lses: I64, merged: I64, merged_lse: I64) -> None:
        head = block.index[0]
        first = (head * splits).wide()
        _keep_lses(block, lses + first * 4, splits, padded)
        highest = _highest(block, padded)
        empty = highest.equals(float("-inf"))
        reference = select(empty, F32.constant(0.0), highest)
        own = _add_splits(block, parts + first * (4 * head_dim), reference, splits, head_dim)
        total, sums = _add_warps(block, own, padded, head_dim)
        divisor = select(empty, F32.constant(1.0), total)
        place = merged + head.wide() * (4 * head_dim) + block.thread * 4
        for step, value in enumerate(sums):
            channel = block.thread + step * _LANES * WARPS
            ptx.store(
                place,
                value * ptx.reciprocal(divisor),
                offset=4 * step * _LANES * WARPS,
                only=channel.less(head_dim),
            )
        ptx.store(
            merged_lse + head.wide() * 4,
            (reference + ptx.log2(total)) * LOG_2,
            only=block.thread.equals(0),
        )

    merged, merged_lse = launch(
        body,
        output,
        lse,
        results=results,
        grid=(batch * heads,),
        warpgroups=1,
        shared_bytes=4 * (padded + WARPS * (1 + head_dim)),
    )
    return merged, merged_lse


def _keep_lses(block: Block, lses: I64, splits: int, padded: int) -> None:
    """Brings log-sum-exps, in units of log 2, into shared memory, and pads them with -inf."""

    def keep(split: I32, carry: list) -> list:
        lse = ptx.load(lses + split.minimum(splits - 1) * 4)[0].as_float() * LOG2_E
        lse = select(split.less(splits), lse, F32.constant(float("-inf")))
        ptx.store(block.shared + split * 4, lse)
        return carry

    loop(block.thread, I32.constant(padded), _LANES * WARPS, [], keep)
    ptx.barrier()


def _highest(block: Block, padded: int) -> F32:
    def higher(place: I32, carry: list) -> list:
        (highest,) = carry
        for word in ptx.load(block.shared + place * 4, count=4):
            highest = ptx.maximum(highest, word.as_float())
        return [highest]

    start = [F32.constant(float("-inf"))]
    return loop(I32.constant(0), I32.constant(padded), 4, start, higher)[0]


def _add_splits(
    block: Block, parts: I64, reference: F32, splits: int, head_dim: int
) -> tuple[F32, list[F32]]:
    """What a warp finds in its splits: their weight, and sums at the lane's channels."""
    steps = -(-head_dim // _LANES)

    def add(turn: I32, carry: list) -> list:
        total, *sums = carry
        for offset in range(_AT_ONCE):
            # Splits beyond the last weigh nothing.
            split = (turn + offset) * WARPS + block.warp
            lse = ptx.load(block.shared + split * 4)[0].as_float()
            weight = ptx.exp2(lse - reference)
            total = total + weight
            row = parts + split.minimum(splits - 1) * (4 * head_dim)
            for step in range(steps):
                channel = (block.lane + step * _LANES).minimum(head_dim - 1)
                part = ptx.load(row + channel * 4, once=True)[0].as_float()
                sums[step] = ptx.fma(weight, part, sums[step])
        return [total, *sums]

    zeros = [F32.constant(0.0)] * (1 + steps)
    turns = I32.constant(-(-splits // WARPS))
    total, *sums = loop(I32.constant(0), turns, _AT_ONCE, zeros, add)
    return total, sums


def _add_warps(
    block: Block, own: tuple[F32, list[F32]], padded: int, head_dim: int
) -> tuple[F32, list[F32]]:
    """What all warps found: their weight, and sums at channels `thread + 128·step`."""
    totals = block.shared + 4 * padded
    sums = totals + 4 * WARPS
    total, parts = own
    ptx.store(totals + block.warp * 4, total, only=block.lane.equals(0))
    for step, part in enumerate(parts):
        channel = block.lane + step * _LANES
        place = sums + (block.warp * head_dim + channel) * 4
        ptx.store(place, part, only=channel.less(head_dim))
    ptx.barrier()
    weights = [word.as_float() for word in ptx.load(totals, count=WARPS)]
    result = []
    for step in range(-(-head_dim // (_LANES * WARPS))):
        channel = (block.thread + step * _LANES * WARPS).minimum(head_dim - 1)
        value = F32.constant(0.0)
        for warp in range(WARPS):
            value = value + ptx.load(sums + channel * 4, warp * head_dim * 4)[0].as_float()
        result.append(value)
    return weights[0] + weights[1] + (weights[2] + weights[3]), result
