"""Merges the partial attentions of the splits in one small launch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.launch import Block, launch
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, loop, select

_THREADS = 128
_AT_ONCE = 8
_LOG_2 = 0.6931471805599453
_LOG2_E = 1.4426950408889634


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

    def body(block: Block, parts: I64, weights: I64, merged: I64, merged_lse: I64) -> None:
        head = block.index[0]
        _keep_weights(block, weights + (head * splits).wide() * 4, splits)
        highest = _highest(block, splits)
        empty = highest.equals(float("-inf"))
        reference = select(empty, F32.constant(0.0), highest)

        def channel(index: I32, carry: list) -> list:
            column = parts + (head * splits).wide() * (4 * head_dim) + index * 4

            def add(chunk: I32, carry: list) -> list:
                total, value = carry
                for offset in range(_AT_ONCE):
                    # Places beyond the last split weigh nothing.
                    split = chunk + offset
                    weight = ptx.exp2(_weight(block, split) - reference)
                    place = column + split.minimum(splits - 1) * (4 * head_dim)
                    part = ptx.load(place, once=True)[0].as_float()
                    total, value = total + weight, ptx.fma(weight, part, value)
                return [total, value]

            zero = F32.constant(0.0)
            total, value = loop(I32.constant(0), I32.constant(splits), _AT_ONCE, [zero, zero], add)
            divisor = select(empty, F32.constant(1.0), total)
            ptx.store(
                merged + head.wide() * (4 * head_dim) + index * 4, value * ptx.reciprocal(divisor)
            )
            own = (reference + ptx.log2(total)) * _LOG_2
            ptx.store(merged_lse + head.wide() * 4, own, only=index.equals(0))
            return carry

        loop(block.thread, I32.constant(head_dim), _THREADS, [], channel)

    merged, merged_lse = launch(
        body,
        output,
        lse,
        results=results,
        grid=(batch * heads,),
        warpgroups=1,
        shared_bytes=4 * _padded(splits),
    )
    return merged, merged_lse


def _padded(splits: int) -> int:
    return -(-splits // _AT_ONCE) * _AT_ONCE


def _keep_weights(block: Block, weights: I64, splits: int) -> None:
    """Brings log-sum-exps, in units of log 2, into shared memory, and pads them with -inf."""

    def keep(split: I32, carry: list) -> list:
        lse = ptx.load(weights + split.minimum(splits - 1) * 4)[0].as_float() * _LOG2_E
        lse = select(split.less(splits), lse, F32.constant(float("-inf")))
        ptx.store(block.shared + split * 4, lse)
        return carry

    loop(block.thread, I32.constant(_padded(splits)), _THREADS, [], keep)
    ptx.barrier()


def _highest(block: Block, splits: int) -> F32:
    def raise_(chunk: I32, carry: list) -> list:
        (highest,) = carry
        for offset in range(_AT_ONCE):
            highest = ptx.maximum(highest, _weight(block, chunk + offset))
        return [highest]

    start = [F32.constant(float("-inf"))]
    return loop(I32.constant(0), I32.constant(splits), _AT_ONCE, start, raise_)[0]


def _weight(block: Block, split: I32) -> F32:
    return ptx.load(block.shared + split * 4)[0].as_float()
