"""What a cache stores, and what that costs in bytes."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Self

import jax.numpy as jnp
from jax.typing import DTypeLike

from h1bjax.cache.keys import GaussianSigns, KeyCodec, OrthogonalSigns, TwoPlanes
from h1bjax.cache.values import QuantisedValues
from h1bjax.config import LlamaConfig
from pallas_kernels.packing import TOKEN_BLOCK

Scores = Literal["raw", "corrected", "fitted"]

_BF16_BYTES = 2
_WORD_BYTES = 4


@dataclass(frozen=True)
class CacheSpec:
    """The static description of a key-value cache.

    Attributes:
        name: how reports call it.
        keys: the key codec; None stores keys exactly, in the compute dtype.
        values: the value codec; None stores values exactly, in the compute dtype.
        sinks: S, the first tokens, which are also kept exactly in bf16.
        window: W, the latest tokens, which are also kept exactly in bf16.
        scores: how sketched logits are repaired for their estimation noise, which inflates the
            softmax mass of the many. "raw": not at all. "corrected": by half their variance,
            which needs no calibration. "fitted": by a temperature and an offset of each query
            head, which calibration fits.
        rope_period: B: stored keys carry RoPE only for their offset inside a block of B tokens,
            and the query is turned back by the block's position. None keeps the full RoPE.

    Raises:
        ValueError: the parts do not fit together.
    """

    name: str
    keys: KeyCodec | None = None
    values: QuantisedValues | None = None
    sinks: int = 0
    window: int = 0
    scores: Scores = "raw"
    rope_period: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.sinks < 0 or self.window < 0:
            problems.append(f"sinks={self.sinks} and window={self.window} must not be negative")
        if self.sinks and not self.window:
            problems.append(f"sinks={self.sinks} need a window of at least 1 token")
        if self.keys is None and self.values is None and self.window:
            problems.append("an exact cache needs no window")
        if self.keys is None and (self.scores != "raw" or self.rope_period is not None):
            problems.append("scores and rope_period describe sketched keys, but keys are exact")
        if self.scores not in ("raw", "corrected", "fitted"):
            problems.append(f"scores={self.scores!r}; use 'raw', 'corrected' or 'fitted'")
        if self.scores == "corrected" and self.keys is not None and not self.keys.scaled:
            problems.append(f"{type(self.keys).__name__} has no variance correction")
        if self.rope_period is not None:
            if self.rope_period <= 0 or TOKEN_BLOCK % self.rope_period:
                problems.append(f"rope_period={self.rope_period} must divide {TOKEN_BLOCK}")
            if self.keys is not None and self.keys.signed_query:
                problems.append("a finite rope_period needs an unsigned query")
        if problems:
            raise ValueError(f"cache spec {self.name!r}: " + "; ".join(problems))

    @classmethod
    def preset(cls, name: str) -> "CacheSpec":
        """The preset of that name.

        Raises:
            ValueError: there is none; the message lists them.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown cache preset {name!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def replace(self, **changes: Any) -> Self:
        """A copy with some attributes changed, checked again."""
        return replace(self, **changes)

    @property
    def exact_tokens(self) -> int:
        """S + W, the tokens that are kept exactly beside the stored ones."""
        return self.sinks + self.window

    def bytes_per_token(self, head_dim: int, dtype: DTypeLike = jnp.bfloat16) -> int:
        """Marginal bytes of one more token in one layer's KV head, every scalar counted.

        Args:
            head_dim: channels of a key and of a value.
            dtype: the compute dtype, in which exact keys and values are stored.
        """
        exact = head_dim * jnp.dtype(dtype).itemsize
        if self.keys is None:
            key_bytes = exact
        else:
            key_bytes = self.keys.sketch_bits(head_dim) // 8 + _BF16_BYTES * self.keys.scaled
        if self.values is None:
            value_bytes = exact
        else:
            value_bytes = _WORD_BYTES * self.values.words(head_dim) + 2 * _BF16_BYTES
        return key_bytes + value_bytes

    def nbytes(
        self,
        config: LlamaConfig,
        *,
        batch: int,
        max_length: int,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> int:
        """Bytes of a whole cache: padding to 128 tokens and the window included.

        Args:
            config: the model's.
            batch: sequences.
            max_length: tokens each sequence can hold, before padding.
            dtype: the compute dtype.
        """
        heads = config.num_layers * batch * config.num_kv_heads
        stored = padded_capacity(max_length) * self.bytes_per_token(config.head_dim, dtype)
        window = self.exact_tokens * 2 * config.head_dim * _BF16_BYTES
        return heads * (stored + window)


def padded_capacity(max_length: int) -> int:
    """`max_length` rounded up to a multiple of 128 tokens.

    Raises:
        ValueError: `max_length` is not positive.
    """
    if max_length <= 0:
        raise ValueError(f"max_length={max_length} must be positive")
    return -(-max_length // TOKEN_BLOCK) * TOKEN_BLOCK


def _windowed(name: str, keys: KeyCodec, values: QuantisedValues) -> CacheSpec:
    return CacheSpec(name, keys, values, sinks=4, window=60, scores="corrected")


PRESETS = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            CacheSpec("exact"),
            CacheSpec("h1b-paper", GaussianSigns(), QuantisedValues(4)),
            _windowed("h1b", OrthogonalSigns(), QuantisedValues(4)),
            _windowed("h1b-v3", OrthogonalSigns(), QuantisedValues(3, rotated=True)),
            _windowed("h1b-v2", OrthogonalSigns(), QuantisedValues(2, rotated=True)),
            _windowed("h1b-2plane", TwoPlanes(), QuantisedValues(4)),
            _windowed("h1b-2plane-v2", TwoPlanes(), QuantisedValues(2, rotated=True)),
        )
    }
)
"""The specs that have a name."""
