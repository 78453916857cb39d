"""Keys quantised channel by channel in groups of tokens, as KIVI does (arXiv 2402.02750)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.affine import dequantise, quantise
from pallas_kernels.exact_attention.reference import exact_logits
from pallas_kernels.packing import (
    TOKEN_BLOCK,
    pack_scalar_pair,
    unpack_rows,
    unpack_scalar_pair,
    words_per_column,
)
from pallas_kernels.sketch_attention.blocks import BlockScores, read_block

_WORD_BYTES = 4


class EncodedKeyGroups(NamedTuple):
    """Quantised keys before packing: `k ≈ zero + scale·code`."""

    codes: Int32[Array, "*groups tokens kv_heads head_dim"]
    scale: BFloat16[Array, "*groups kv_heads head_dim"]
    zero: BFloat16[Array, "*groups kv_heads head_dim"]

    @property
    def scalars(self) -> Int32[Array, "*groups channels"]:
        """Scale (high half) and zero of every channel of all KV heads, in one word."""
        return rearrange(pack_scalar_pair(self.scale, self.zero), "... k d -> ... (k d)")


@dataclass(frozen=True)
class ChannelQuantisedKeys:
    """Affine codes per channel: `group` consecutive tokens share a bf16 scale and zero.

    Keys have outliers in a few channels, which a scale per channel confines to them. A group is
    quantised once, when its last token arrives, from its keys as the exact window holds them.
    Until then its keys are in the window alone, which must therefore be at least `group` long.
    There is nothing to calibrate.

    Attributes:
        bits: n, the width of a code: 4 or 2.
        group: tokens that share a scale and zero, a divisor of 128.

    Raises:
        ValueError: another width or group.
    """

    bits: int = 2
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ValueError(f"keys of {self.bits} bits are not supported; use 4 or 2")
        if self.group <= 0 or TOKEN_BLOCK % self.group:
            raise ValueError(f"groups of {self.group} keys must divide {TOKEN_BLOCK} tokens")

    def words(self, head_dim: int) -> int:
        """int32 words of codes per token and KV head."""
        return words_per_column(head_dim, self.bits)

    def bytes_per_token(self, head_dim: int) -> int:
        """Bytes per token and KV head, with its share of the group's scales and zeros.

        Raises:
            ValueError: the share is no whole number of bytes.
        """
        scalars = _WORD_BYTES * head_dim
        if scalars % self.group:
            raise ValueError(
                f"groups of {self.group} keys need a head dimension that is a multiple of "
                f"{self.group // _WORD_BYTES}, got {head_dim}"
            )
        return _WORD_BYTES * self.words(head_dim) + scalars // self.group

    def encode(self, keys: Float[Array, "*groups tokens kv_heads head_dim"]) -> EncodedKeyGroups:
        """Quantises whole groups of keys."""
        return EncodedKeyGroups(*quantise(keys, self.bits, axis=-3))

    def decode(self, encoded: EncodedKeyGroups) -> Float[Array, "*groups tokens kv_heads head_dim"]:
        """The float32 keys that attention reads."""
        return dequantise(*encoded, axis=-3)


def channel_scores(
    codec: ChannelQuantisedKeys,
    words: Int32[Array, "layers batch rows tokens"],
    scalars: Int32[Array, "layers batch channels groups"],
    layer: Int32[Array, ""],
    query: Float[Array, "batch queries heads head_dim"],
) -> BlockScores:
    """Logits of the queries against any block of one layer's quantised keys.

    Args:
        codec: what wrote them.
        words: codes as `pack_column` packs a key.
        scalars: scale and zero of each group, as in `EncodedKeyGroups.scalars`.
        layer: which layer to read.
        query: after RoPE.
    """
    head_dim = query.shape[-1]

    def scores(
        first: Int32[Array, ""], length: int
    ) -> Float[Array, "batch kv_heads groups queries block"]:
        packed = read_block(words, layer, first, length, axis=3)
        per_head = rearrange(packed, "b (k w) t -> b k w t", w=codec.words(head_dim))
        codes = unpack_rows(per_head, codec.bits, head_dim).astype(jnp.float32)
        shared = read_block(scalars, layer, first // codec.group, length // codec.group, axis=3)
        scale, zero = (
            repeat(half, "b (k d) g -> b k d (g n)", d=head_dim, n=codec.group)
            for half in unpack_scalar_pair(shared)
        )
        return exact_logits(query, rearrange(zero + scale * codes, "b k d t -> b k t d"))

    return scores
