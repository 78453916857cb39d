"""Uniform codes between a minimum and a maximum, with a bf16 scale and zero."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int32


def quantise(
    x: Float[Array, "*shape"], bits: int, axis: int
) -> tuple[Int32[Array, "*shape"], BFloat16[Array, "*shared"], BFloat16[Array, "*shared"]]:
    """Codes in `[0, 2ⁿ)`, and the scale and zero that numbers along `axis` share.

    `zero = min x` and `scale = (max x - min x)/(2ⁿ - 1)`; codes are the nearest, the even one
    of two, with both as they are stored: the same on every backend. The shape of scale and zero is
    that of `x` without `axis`.
    """
    x = x.astype(jnp.float32)
    top = 2**bits - 1
    lowest, highest = jnp.min(x, axis=axis), jnp.max(x, axis=axis)
    zero, scale = _as_bfloat16(lowest), _as_bfloat16((highest - lowest) * (1 / top))
    step, shift = (jnp.expand_dims(s, axis) for s in (scale, zero))
    distance = x - shift
    # Backends round quotients differently, while products with a bf16 scale are exact.
    near = jnp.round(distance / jnp.where(step > 0, step, 1.0))
    above, below, odd = (near + 0.5) * step, (near - 0.5) * step, near % 2 == 1
    up = (distance > above) | (odd & (distance == above))
    down = (distance < below) | (odd & (distance == below))
    codes = jnp.where(step > 0, jnp.clip(near + up - down, 0, top), 0.0).astype(jnp.int32)
    return codes, scale.astype(jnp.bfloat16), zero.astype(jnp.bfloat16)


def dequantise(
    codes: Int32[Array, "*shape"],
    scale: BFloat16[Array, "*shared"],
    zero: BFloat16[Array, "*shared"],
    axis: int,
) -> Float[Array, "*shape"]:
    """`zero + scale·code`, in float32."""
    step, shift = (jnp.expand_dims(s.astype(jnp.float32), axis) for s in (scale, zero))
    return shift + step * codes


def _as_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Float32 rounded to bf16; XLA may leave out a conversion to bf16 and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
