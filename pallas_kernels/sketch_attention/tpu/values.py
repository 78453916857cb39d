"""Weighted sums of value codes on the matrix unit.

Weights are written as integers of 23 bits, whose bytes are rows of an int8 operand as they lie in
memory; codes become the other one by masking. Products are exact integers, so that the only
rounding is that of the weights.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int8, Int32

from pallas_kernels.sketch_attention.tpu.key_tiles import logical_right
from pallas_kernels.sketch_attention.tpu.plan import Plan

WEIGHT_BITS = 22
"""No weight is above 2²²; even what rounding adds to it must not carry it to 2²³."""

_INTEGERS = 2.0**23
_FLIPS = 0x0B808080
_BYTES = 4
_MASKS = {4: 0x0F0F0F0F, 2: 0x03030303}
_THIRD_BITS = 0x04040404
_BOTH_TOKENS = (((1,), (1,)), ((), ()))


def unpack_codes(
    words: Int32[Array, "value_words tokens"], plan: Plan
) -> Int8[Array, "channels tokens"]:
    """Codes of one KV head, a row for each channel."""
    mask = _MASKS[plan.code_width]
    low, high = words[: plan.code_words], words[plan.code_words :]
    shifts = range(0, 8, plan.code_width)
    codes = [logical_right(low, shift) & mask for shift in shifts]
    if plan.value_bits == 3:
        # The high bits of two planes fill as many rows as the low bits of one.
        both = jnp.concatenate([high, logical_right(high, 1)])
        codes = [
            code | ((both << 2 if shift == 0 else logical_right(both, shift - 2)) & _THIRD_BITS)
            for code, shift in zip(codes, shifts, strict=True)
        ]
    return pltpu.bitcast(jnp.concatenate(codes), jnp.int8)


def weight_bytes(weights: Float32[Array, "rows tokens"]) -> Int8[Array, "four_rows tokens"]:
    """The bytes of weights in `[0, 2**23 - 1]`, rounded to integers; row `4·r + byte`.

    A float between 2²³ and 2²⁴ holds an integer in its mantissa. Bytes 0 to 2 come out 128 less
    than they are, to be signed, and byte 3 as 64, which serves to add what is missing.
    """
    bits = pltpu.bitcast(weights + _INTEGERS, jnp.int32)
    return pltpu.bitcast(bits ^ _FLIPS, jnp.int8)


def multiply(
    weights: Int8[Array, "four_rows tokens"], codes: Int8[Array, "channels tokens"]
) -> Int32[Array, "four_rows channels"]:
    """Sums over tokens of each byte times each code."""
    return lax.dot_general(weights, codes, _BOTH_TOKENS, preferred_element_type=jnp.int32)


def add_bytes(
    products: list[Int32[Array, "rows channels"]],
) -> Float32[Array, "rows channels"]:
    """Sums of whole weights from the sums of each of their four bytes."""
    missing = 2 * products[_BYTES - 1]
    total = (products[0] + missing).astype(jnp.float32)
    for byte in range(1, _BYTES - 1):
        total += 256.0**byte * (products[byte] + missing).astype(jnp.float32)
    return total
