"""What a cache stores, and what that costs in bytes."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Self

import jax.numpy as jnp
from jax.typing import DTypeLike

from h1bjax.cache.channel_keys import ChannelQuantisedKeys
from h1bjax.cache.keys import GaussianSigns, KeyCodec, LinearCode, OrthogonalSigns, TwoPlanes
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
        keys: the key codec, which sketches keys or quantises their channels; None stores keys
            exactly, in the compute dtype.
        values: the value codec; None stores values exactly, in the compute dtype.
        sinks: S, the first tokens, which are also kept exactly in bf16.
        window: W, the latest tokens, which are also kept exactly in bf16.
        scores: how sketched logits are repaired for their estimation noise, which inflates the
            softmax mass of the many. "raw": not at all. "corrected": by half their variance,
            which needs no calibration. "fitted": by a temperature and an offset of each query
            head, which calibration fits; until then as "raw".
        rope_period: B: stored keys carry RoPE only for their offset inside a block of B tokens,
            and the query is turned back by the block's position. None keeps the full RoPE.
        evict: whether nothing is stored: tokens that leave the window are forgotten, all but the
            sinks.

    Raises:
        ValueError: the parts do not fit together.
    """

    name: str
    keys: KeyCodec | ChannelQuantisedKeys | None = None
    values: QuantisedValues | None = None
    sinks: int = 0
    window: int = 0
    scores: Scores = "raw"
    rope_period: int | None = None
    evict: bool = False

    def __post_init__(self) -> None:
        problems = []
        sketch = self.sketch
        if self.sinks < 0 or self.window < 0:
            problems.append(f"sinks={self.sinks} and window={self.window} must not be negative")
        if self.sinks and not self.window:
            problems.append(f"sinks={self.sinks} need a window of at least 1 token")
        if self.exact and self.window:
            problems.append("an exact cache needs no window")
        if self.evict and not self.window:
            problems.append("evict=True needs a window, the only place where tokens are kept")
        if self.evict and (self.keys is not None or self.values is not None):
            problems.append("evict=True stores nothing, so keys and values must be None")
        if isinstance(self.keys, ChannelQuantisedKeys) and self.window < self.keys.group:
            problems.append(
                f"window={self.window} must be at least {self.keys.group}, because keys are in "
                "the window alone until their group is complete"
            )
        if sketch is None and (self.scores != "raw" or self.rope_period is not None):
            kind = "exact" if self.keys is None else "quantised"
            problems.append(f"scores and rope_period describe sketched keys, but keys are {kind}")
        if self.scores not in ("raw", "corrected", "fitted"):
            problems.append(f"scores={self.scores!r}; use 'raw', 'corrected' or 'fitted'")
        unknown_noise = sketch is not None and type(sketch).noise is KeyCodec.noise
        if self.scores == "corrected" and unknown_noise:
            problems.append(f"{type(sketch).__name__} has no variance correction")
        if self.rope_period is not None:
            if self.rope_period <= 0 or TOKEN_BLOCK % self.rope_period:
                problems.append(f"rope_period={self.rope_period} must divide {TOKEN_BLOCK}")
            if sketch is not None and sketch.signed_query:
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
    def sketch(self) -> KeyCodec | None:
        """The key codec that has `CodecParameters`; None where keys need none."""
        return self.keys if isinstance(self.keys, KeyCodec) else None

    @property
    def exact(self) -> bool:
        """Whether all keys and values are stored as they are."""
        return self.keys is None and self.values is None and not self.evict

    @property
    def exact_tokens(self) -> int:
        """S + W, the tokens that are kept exactly beside the stored ones."""
        return self.sinks + self.window

    def bytes_per_token(self, head_dim: int, dtype: DTypeLike = jnp.bfloat16) -> int:
        """Marginal bytes of one more token in one layer's KV head, every scalar counted.

        Args:
            head_dim: channels of a key and of a value.
            dtype: the compute dtype, in which exact keys and values are stored.

        Raises:
            ValueError: the codecs do not take this head dimension.
        """
        if self.evict:
            return 0
        exact = head_dim * jnp.dtype(dtype).itemsize
        if self.keys is None:
            key_bytes = exact
        elif isinstance(self.keys, ChannelQuantisedKeys):
            key_bytes = self.keys.bytes_per_token(head_dim)
        else:
            key_bytes = self.keys.sketch_bits(head_dim) // 8 + _BF16_BYTES * self.keys.scaled
        if self.values is None:
            value_bytes = exact
        else:
            affine = 2 * _BF16_BYTES * self.values.groups(head_dim)
            value_bytes = _WORD_BYTES * self.values.words(head_dim) + affine
        return key_bytes + value_bytes

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError if the codecs do not take this head dimension."""
        self.bytes_per_token(head_dim)

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


def padded_capacity(max_length: int, shards: int = 1) -> int:
    """`max_length` rounded up to a multiple of 128 tokens for each shard.

    Raises:
        ValueError: `max_length` is not positive.
    """
    if max_length <= 0:
        raise ValueError(f"max_length={max_length} must be positive")
    multiple = shards * TOKEN_BLOCK
    return -(-max_length // multiple) * multiple


def _signs(name: str, keys: KeyCodec, values: QuantisedValues) -> CacheSpec:
    return CacheSpec(name, keys, values, sinks=4, window=60, scores="corrected")


def _linear(
    name: str, keys: LinearCode, values: QuantisedValues, rope_period: int | None = None
) -> CacheSpec:
    # An unscaled code shortens keys, which a temperature makes up for in part.
    scores: Scores = "raw" if keys.scaled else "fitted"
    return CacheSpec(name, keys, values, 4, 60, scores, rope_period)


def _kivi(bits: Literal[2, 4]) -> CacheSpec:
    """KIVI (arXiv 2402.02750), at a residual of 64 tokens, which is what our presets keep exactly.

    Its own default is a residual of 128, `spec.replace(window=128)`. There, keys are quantised all
    at once when the residual is full; here the window always holds the latest tokens.
    """
    values = QuantisedValues(bits, group=32)
    return CacheSpec(f"kivi-{bits}", ChannelQuantisedKeys(bits, group=32), values, window=64)


FOUR_BITS = QuantisedValues(4)
THREE_BITS = QuantisedValues(3, rotated=True)
TWO_BITS = QuantisedValues(2, rotated=True)

PRESETS = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            CacheSpec("exact"),
            CacheSpec("h1b-paper", GaussianSigns(), FOUR_BITS, scores="fitted"),
            _linear("h1b", LinearCode(), FOUR_BITS),
            _linear("h1b-v3", LinearCode(), THREE_BITS),
            _linear("h1b-v2", LinearCode(), TWO_BITS),
            _linear("h1b-p32", LinearCode(), FOUR_BITS, rope_period=32),
            _linear("h1b-p32-v2", LinearCode(), TWO_BITS, rope_period=32),
            _linear("h1b-256-v2", LinearCode(rate=2.0), TWO_BITS),
            _linear("h1b-64-p32-v2", LinearCode(rate=0.5), TWO_BITS, rope_period=32),
            _linear("h1b-unscaled", LinearCode(scaled=False), FOUR_BITS),
            _linear("h1b-unscaled-p32", LinearCode(scaled=False), FOUR_BITS, rope_period=32),
            _signs("h1b-signs", OrthogonalSigns(), FOUR_BITS),
            _signs("h1b-signs-v3", OrthogonalSigns(), THREE_BITS),
            _signs("h1b-signs-v2", OrthogonalSigns(), TWO_BITS),
            _signs("h1b-2plane", TwoPlanes(), FOUR_BITS),
            _signs("h1b-2plane-v2", TwoPlanes(), TWO_BITS),
            _kivi(2),
            _kivi(4),
            # StreamingLLM (arXiv 2309.17453), but with positions as in the text; at 2048 tokens
            # as large as h1b.
            CacheSpec("sinks-window", sinks=4, window=404, evict=True),
        )
    }
)
"""The specs that have a name."""

UNCALIBRATED = MappingProxyType(
    {"h1b": "h1b-signs", "h1b-v3": "h1b-signs-v3", "h1b-v2": "h1b-signs-v2"}
)
"""The preset of the same bytes that stands in for one which has no calibration yet."""
