"""What every implementation of the append takes, named and shaped once."""

from dataclasses import dataclass, field
from math import inf

import jax
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.sketch_attention.arguments import PackedKeys, PackedValues


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyEncoder:
    """How keys become sign bits, and a scalar that says how long the sketched key is.

    With `u = projection (k - mean)`, bit j is set where `u_j >= 0`. Two variants:

    - With `magnitude`, a second plane of bits follows the first: component i of the code is
      ±3 where `|u_i| > magnitude·‖u‖/√components`, else ±1, written `2a + a'` in signs.
    - With `levels` and `weight`, u_j is in units of a quantiser's step, and bit j is the binary
      digit with place value `weight_j` of `clip(⌊u_j⌋ + levels_j, 0, 2·levels_j - 1)`.

    With `scaled`, the scalar is `s = ‖y‖²/(y·ŷ)`, 0 where that is negative and at most `longest`:
    y is the centred key and ŷ what its code c decodes to, in directions where that is short of a
    factor, both in a metric. Without `metric`, `y·ŷ = u·code`, as for an orthogonal projection;
    with it, `y = metric (k - mean)` and `y·ŷ = c·reading (k - mean)`.

    Attributes:
        projection: float32.
        mean: float32, the key that sketches are relative to.
        levels: float32; given with `weight`.
        weight: float32.
        reading: float32, what each sign adds to `y·ŷ`; given with `metric`. If A decodes the
            signs, `ŷ = metric · A c`, it is `Aᵀ · metricᵀ · metric`.
        metric: float32.
        scaled: whether there is a scalar. Static.
        magnitude: see above. Static.
        longest: see above. Static.
    """

    projection: Float[Array, "*layers kv_heads components head_dim"]
    mean: Float[Array, "*layers kv_heads head_dim"]
    levels: Float[Array, "*layers kv_heads bits"] | None = None
    weight: Float[Array, "*layers kv_heads bits"] | None = None
    reading: Float[Array, "*layers kv_heads bits head_dim"] | None = None
    metric: Float[Array, "*layers kv_heads head_dim head_dim"] | None = None
    scaled: bool = field(default=True, metadata={"static": True})
    magnitude: float | None = field(default=None, metadata={"static": True})
    longest: float = field(default=inf, metadata={"static": True})

    @property
    def bits(self) -> int:
        """Sign bits of a sketch."""
        components = self.projection.shape[-2]
        return components if self.magnitude is None else 2 * components


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExactWindow:
    """The tokens of all layers that are kept as they are: the first, and a ring of the latest.

    Attributes:
        keys: bf16 as bit patterns; `channels = kv_heads · head_dim`. Token n lies in slot n where
            `n < sinks`, else in slot `sinks + (n - sinks) mod (window - sinks)`.
        values: likewise.
        sinks: how many first tokens are kept. Static.
    """

    keys: UInt16[Array, "layers batch window channels"]
    values: UInt16[Array, "layers batch window channels"]
    sinks: int = field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredTokens:
    """All that an append writes.

    Attributes:
        keys: sketches.
        values: value codes with one scale and zero for the whole head.
        window: None where no tokens are kept exactly.
    """

    keys: PackedKeys
    values: PackedValues
    window: ExactWindow | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Token:
    """One new token of each row.

    Attributes:
        keys: as the window keeps them, and as the sketch describes them unless `relative_keys`
            are given.
        values: of the same tokens.
        positions: where to write; nothing is written where this is negative or not below the
            capacity.
        relative_keys: what the sketch describes where that is not `keys`: keys with RoPE for
            their offset inside a block only.
    """

    keys: Float[Array, "batch kv_heads head_dim"]
    values: Float[Array, "batch kv_heads head_dim"]
    positions: Int32[Array, "batch"]
    relative_keys: Float[Array, "batch kv_heads head_dim"] | None = None
