"""Value codecs: how a value becomes a few-bit codes with one scale and zero."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int32, Key

from pallas_kernels.packing import words_per_column


class EncodedValues(NamedTuple):
    """Quantised values before packing: `v ≈ zero + scale·code`."""

    codes: Int32[Array, "*tokens kv_heads head_dim"]
    scale: BFloat16[Array, "*tokens kv_heads"]
    zero: BFloat16[Array, "*tokens kv_heads"]


@dataclass(frozen=True)
class QuantisedValues:
    """Per-vector affine codes: `zero = min v`, `scale = (max v - min v)/(2ⁿ - 1)`, both bf16.

    Attributes:
        bits: n, the width of a code: 4, 3 or 2.
        rotated: whether the model's values are rotated by an orthogonal matrix first, which
            spreads outlier channels. The rotation is folded into the weights when a model is
            loaded (`fold_value_rotation`) and costs nothing at run time.

    Raises:
        ValueError: another width.
    """

    bits: int = 4
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ValueError(f"values of {self.bits} bits are not supported; use 4, 3 or 2")

    def words(self, head_dim: int) -> int:
        """int32 words per token and KV head."""
        return words_per_column(head_dim, self.bits)

    def encode(self, values: Float[Array, "*tokens kv_heads head_dim"]) -> EncodedValues:
        """Quantises values with the scale and zero as they are stored."""
        values = values.astype(jnp.float32)
        top = 2**self.bits - 1
        lowest, highest = jnp.min(values, axis=-1), jnp.max(values, axis=-1)
        zero = lowest.astype(jnp.bfloat16)
        scale = ((highest - lowest) / top).astype(jnp.bfloat16)
        step = scale.astype(jnp.float32)[..., None]
        offset = values - zero.astype(jnp.float32)[..., None]
        level = jnp.where(step > 0, offset / jnp.where(step > 0, step, 1.0), 0.0)
        return EncodedValues(
            jnp.clip(jnp.round(level), 0, top).astype(jnp.int32),
            scale,
            zero,
        )

    def decode(self, encoded: EncodedValues) -> Float[Array, "*tokens kv_heads head_dim"]:
        """The float32 values that attention reads."""
        scale, zero = (
            scalar.astype(jnp.float32)[..., None] for scalar in (encoded.scale, encoded.zero)
        )
        return zero + scale * encoded.codes


def random_rotation(
    rng: Key[Array, ""], layers: int, kv_heads: int, head_dim: int
) -> Float[Array, "layers kv_heads head_dim head_dim"]:
    """A random orthogonal matrix for every layer's KV head, float32."""
    return jax.random.orthogonal(rng, head_dim, (layers, kv_heads))
