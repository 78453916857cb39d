"""How likely a decoder finds each token of many windows, read through its own cache."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float32, Float64, Int32
from tqdm import tqdm

from h1bjax.cache import KVCache
from h1bjax.decoder import Decoder
from h1bjax.sharding import padded_rows, to_host
from h1bjax.windows import Windows

SCORE_CHUNK = 512
"""Windows longer than this many tokens are read in chunks of at most as many."""

LOGITS_BYTES = 2**27
"""Logits exist for about this many bytes at a time, however many rows there are."""


@dataclass(frozen=True, eq=False)
class WindowScores:
    """What a decoder made of windows.

    Attributes:
        nats: negative log-likelihood of each target, natural logarithm; 0 at padding.
        correct: whether each target was the most probable token; False at padding.
        cache: the cache that was read; its lengths are those of the last windows.
    """

    nats: Float64[np.ndarray, "windows tokens"]
    correct: Bool[np.ndarray, "windows tokens"]
    cache: KVCache


@dataclass(frozen=True)
class Loss:
    """How well some of the tokens were predicted.

    Attributes:
        nats: their negative log-likelihood, natural logarithm.
        tokens: how many they are.
        bytes: UTF-8 bytes that they stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @classmethod
    def create(
        cls, windows: Windows, scores: WindowScores, chosen: Bool[np.ndarray, "windows tokens"]
    ) -> Self | None:
        """The loss of the chosen targets; None where they have no bytes."""
        size = int(windows.target_bytes[chosen].sum())
        if not size:
            return None
        return cls(float(scores.nats[chosen].sum()), int(chosen.sum()), size)

    @property
    def nats_per_token(self) -> float:
        """The mean over tokens, which depends on the tokenizer."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The total in bits over the bytes, comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def score_windows(
    decoder: Decoder, windows: Windows, *, batch: int, length: int | None = None
) -> WindowScores:
    """Scores the targets of windows, each read through an empty cache as decoding would read it.

    `batch` and `length` alone decide what is compiled, once for each decoder config, cache spec
    and structure of codec parameters: give several sets of windows the same to compile once.

    Args:
        decoder: its spec is the cache that is read.
        windows: at least one.
        batch: windows scored at a time; the last may be fewer.
        length: tokens that the cache can hold, by default those of the longest window.

    Raises:
        ValueError: a size is invalid, or the model's sliding window is exceeded.
        FloatingPointError: the model's logits are not finite.
    """
    length = windows.longest if length is None else length
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    if windows.longest > length:
        raise ValueError(f"windows of {windows.longest} tokens do not fit length={length}")
    cache = decoder.init_cache(batch=padded_rows(decoder.mesh, batch), max_length=length)
    nats = np.zeros(windows.inputs.shape, np.float64)
    correct = np.zeros(windows.inputs.shape, bool)
    # disable=None shows the bar on a terminal only.
    with tqdm(
        total=int(windows.lengths.sum()), desc="Scoring", unit="token", disable=None, leave=False
    ) as progress:
        for begin in range(0, len(windows), batch):
            rows = slice(begin, begin + batch)
            nats[rows], correct[rows], cache = _score_rows(decoder, windows, rows, cache, length)
            bad = np.flatnonzero(~np.all(np.isfinite(nats[rows]), axis=1))
            if bad.size:
                raise FloatingPointError(
                    f"the logits of window {begin + bad[0]} are not finite; the weights may "
                    "overflow in this dtype"
                )
            progress.update(int(windows.lengths[rows].sum()))
    return WindowScores(nats, correct, cache)


def _score_rows(
    decoder: Decoder, windows: Windows, rows: slice, cache: KVCache, length: int
) -> tuple[np.ndarray, np.ndarray, KVCache]:
    """Nats and hits of one batch, and the cache. Donates `cache`, whose contents do not matter."""
    # What lies beyond a row's length is never read, so emptying a cache is forgetting lengths.
    cache = replace(cache, lengths=jnp.zeros_like(cache.lengths))
    lengths = windows.lengths[rows]
    count, width = _chunks(length, cache.batch, decoder.config.vocab_size)
    shape = (cache.batch, count * width)
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    # Absent rows and what follows the end of a row have position -1.
    positions = np.full(shape, -1, np.int32)
    here = (slice(len(lengths)), slice(windows.longest))
    inputs[here], targets[here] = windows.inputs[rows], windows.targets[rows]
    index = np.arange(windows.longest, dtype=np.int32)
    positions[here] = np.where(index < lengths[:, None], index, -1)
    parts = []
    for begin in range(0, int(lengths.max(initial=0)), width):
        part = (slice(None), slice(begin, begin + width))
        *scored, cache = _score_chunk(decoder, inputs[part], positions[part], targets[part], cache)
        parts.append(scored)
    nats, correct = np.zeros(shape, np.float64), np.zeros(shape, bool)
    # Read only now, so that the device has all chunks to work on meanwhile.
    for index_of, scored in enumerate(parts):
        part = (slice(None), slice(index_of * width, (index_of + 1) * width))
        nats[part], correct[part] = map(to_host, scored)
    return nats[here], correct[here], cache


def _chunks(length: int, batch: int, vocab_size: int) -> tuple[int, int]:
    """Chunks of a window and tokens of a chunk, a multiple of the logits' block."""
    count = -(-length // SCORE_CHUNK)
    block = _logits_block(-(-length // count), batch, vocab_size)
    return count, -(-length // (count * block)) * block


def _logits_block(width: int, batch: int, vocab_size: int) -> int:
    """Tokens of a chunk whose logits exist at a time, in blocks of equal size."""
    most = max(1, LOGITS_BYTES // (4 * batch * vocab_size))
    return -(-width // -(-width // most))


@partial(jax.jit, donate_argnames="cache")
def _score_chunk(
    decoder: Decoder,
    tokens: Int32[Array, "batch tokens"],
    positions: Int32[Array, "batch tokens"],
    targets: Int32[Array, "batch tokens"],
    cache: KVCache,
) -> tuple[Float32[Array, "batch tokens"], Bool[Array, "batch tokens"], KVCache]:
    """Negative log-likelihood of each target and whether it is the likeliest; 0 at padding."""
    hidden, new_cache = decoder.hidden(tokens, positions, cache)
    assert new_cache is not None
    batch, width = tokens.shape
    block = _logits_block(width, batch, decoder.config.vocab_size)

    def score(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, positions, targets = part
        logits = decoder.logits(hidden)
        wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - wanted
        valid = positions >= 0
        return jnp.where(valid, losses, 0.0), valid & (jnp.argmax(logits, axis=-1) == targets)

    parts = (
        rearrange(hidden, "b (n t) e -> n b t e", t=block),
        rearrange(positions, "b (n t) -> n b t", t=block),
        rearrange(targets, "b (n t) -> n b t", t=block),
    )
    nats, correct = (rearrange(scored, "n b t -> b (n t)") for scored in jax.lax.map(score, parts))
    return nats, correct, new_cache
