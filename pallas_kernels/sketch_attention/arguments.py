"""What every implementation of sketch attention takes, named and shaped once."""

from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedKeys:
    """Sketched keys of all layers, packed as `pallas_kernels.packing` defines.

    Attributes:
        words: sign bits, a set bit is +1 and a clear bit -1; `rows = kv_heads · bits/32`.
        scales: one bf16 scalar per key as bit patterns in paired rows,
            `scalar_rows = 2·kv_heads`; None where the sketch has none.
    """

    words: Int32[Array, "layers batch rows tokens"]
    scales: UInt16[Array, "layers batch scalar_rows half_tokens"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedValues:
    """Quantised values of all layers, packed as `pallas_kernels.packing` defines.

    Attributes:
        words: one code per channel; `rows = kv_heads · words per column`.
        affine: scale (high half) and zero of each value, both bf16, in one word, or of each of
            the groups into which the channels of a head are divided; `group_rows = kv_heads ·
            groups`. `sketch_attention` itself takes whole heads only.
        bits: width of a code: 4, 3 or 2. Static.
    """

    words: Int32[Array, "layers batch rows tokens"]
    affine: Int32[Array, "layers batch group_rows tokens"]
    bits: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockRope:
    """A finite RoPE period: keys were sketched relative to the start of their block.

    Attributes:
        frequencies: radians per token of each channel pair.
        mean: the block-relative mean key, which the sketch leaves out.
        period: tokens per block, a divisor of 128. Static.
    """

    frequencies: Float[Array, "half_dim"]
    mean: Float[Array, "kv_heads head_dim"]
    period: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedTransform:
    """Transforms of all layers in the order in which the lanes of a GPU read them.

    Attributes:
        fragments: pairs of float16; the last axis is what one lane reads at once, and `reads` is
            a quarter of the words of a sketch, rounded up, `steps` the bits of a byte that a lane
            takes, and `slices` are of 16 channels.
        norm: what the fragments must be multiplied by.
    """

    fragments: Int32[Array, "layers kv_heads reads steps slices 32 4"]
    norm: Float32[Array, "layers kv_heads"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SketchQuery:
    """Queries, and how they score a sketch of signs `c ∈ {±1}^bits` with scalar `s`.

    The logit of a key is `scale · s · (transformᵀ q) · c - variance · s² · ‖code‖²`, where a
    signed query uses the signs of `transformᵀ q` (zero counts as +1) and a sketch without
    scalars has `s = 1` and no variance term. With a finite RoPE period, q is first turned back by
    the position n0 where the key's block begins, q' = RoPE₋ₙ₀ q, and `q'·mean/√D` is added.

    Attributes:
        vectors: queries after RoPE.
        transform: the linear decoder of the keys, or the projection of a signed query.
        scale: factor of each query head; in a NumPy array, and the same for all, it is compiled
            into a kernel instead of being passed.
        variance: half the variance of the logit per squared code norm; None for raw scores.
        rope: the finite RoPE period; None when keys were sketched with their full RoPE.
        prepared: what `prepare_transform` made of the transforms of all layers; None leaves that
            to every call.
        signed: whether the query is reduced to signs too. Static.
        planes: 1 where a component is one sign, `‖code‖² = bits`; 2 where bits `i` and
            `i + bits/2` form the code `2a + a'`. Static; used by the variance term only.
    """

    vectors: Float[Array, "batch queries heads head_dim"]
    transform: Float[Array, "kv_heads head_dim bits"]
    scale: Float[Array | np.ndarray, "heads"]
    variance: Float[Array, "batch queries heads"] | None = None
    rope: BlockRope | None = None
    prepared: PreparedTransform | None = None
    signed: bool = field(default=False, metadata={"static": True})
    planes: int = field(default=1, metadata={"static": True})
