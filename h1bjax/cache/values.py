"""Value codecs: how a value becomes few-bit codes, with a scale and zero for all or for groups."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from einops import rearrange
from jaxtyping import Array, BFloat16, Float, Int32, Key, Shaped

from pallas_kernels.affine import dequantise, quantise
from pallas_kernels.packing import VALUE_BITS, words_per_column


class EncodedValues(NamedTuple):
    """Quantised values before packing: `v ≈ zero + scale·code`.

    There are `groups = head_dim / group` scales and zeros, one where the whole head shares them.
    """

    codes: Int32[Array, "*tokens kv_heads head_dim"]
    scale: BFloat16[Array, "*tokens kv_heads groups"]
    zero: BFloat16[Array, "*tokens kv_heads groups"]


@dataclass(frozen=True)
class QuantisedValues:
    """Per-vector affine codes: `zero = min v`, `scale = (max v - min v)/(2ⁿ - 1)`, both bf16.

    Attributes:
        bits: n, the width of a code: 4, 3 or 2.
        rotated: whether the model's values are rotated by an orthogonal matrix first, which
            spreads outlier channels. The rotation is folded into the weights when a model is
            loaded (`fold_value_rotation`) and costs nothing at run time.
        group: consecutive channels that share a scale and zero; None for the whole head.

    Raises:
        ValueError: another width, or a group that is not positive.
    """

    bits: int = 4
    rotated: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in VALUE_BITS:
            raise ValueError(f"values of {self.bits} bits are not supported; use 4, 3 or 2")
        if self.group is not None and self.group <= 0:
            raise ValueError(f"groups of {self.group} channels must be positive")

    def words(self, head_dim: int) -> int:
        """int32 words per token and KV head."""
        return words_per_column(head_dim, self.bits)

    def groups(self, head_dim: int) -> int:
        """Pairs of scale and zero per token and KV head.

        Raises:
            ValueError: the head dimension is no multiple of the group.
        """
        group = self.group or head_dim
        if head_dim % group:
            raise ValueError(
                f"values with a scale for {group} channels need a head dimension that is a "
                f"multiple of {group}, got {head_dim}"
            )
        return head_dim // group

    def encode(self, values: Float[Array, "*tokens kv_heads head_dim"]) -> EncodedValues:
        """Quantises values with the scale and zero as they are stored."""
        grouped = self._grouped(values)
        codes, scale, zero = quantise(grouped, self.bits, axis=-1)
        return EncodedValues(codes.reshape(values.shape), scale, zero)

    def decode(self, encoded: EncodedValues) -> Float[Array, "*tokens kv_heads head_dim"]:
        """The float32 values that attention reads."""
        grouped = self._grouped(encoded.codes)
        decoded = dequantise(grouped, encoded.scale, encoded.zero, axis=-1)
        return decoded.reshape(encoded.codes.shape)

    def _grouped(
        self, per_head: Shaped[Array, "*tokens kv_heads head_dim"]
    ) -> Shaped[Array, "*tokens kv_heads groups channels"]:
        groups = self.groups(per_head.shape[-1])
        return rearrange(per_head, "... (g c) -> ... g c", g=groups)


def random_rotation(
    rng: Key[Array, ""], layers: int, kv_heads: int, head_dim: int
) -> Float[Array, "layers kv_heads head_dim head_dim"]:
    """A random orthogonal matrix for every layer's KV head, float32."""
    return jax.random.orthogonal(rng, head_dim, (layers, kv_heads))
