"""How well a model predicts a text when it reads its own cache."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float32, Int32
from tqdm import tqdm

from h1bjax.cache import KVCache
from h1bjax.decoder import Decoder
from h1bjax.model import Model
from h1bjax.tokenizer import Tokenizer

SCORE_CHUNK = 512
"""Windows longer than this many tokens are read in chunks of at most as many."""

LOGITS_BLOCK = 256
"""Logits exist for at most about this many tokens of all rows at a time."""


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted.

    Attributes:
        nats_per_token: mean negative log-likelihood of the scored tokens, natural logarithm.
        bits_per_byte: the same total in bits, over the UTF-8 bytes of the scored tokens.
        tokens: scored tokens.
        bytes: UTF-8 bytes that the scored tokens stand for.
        cache: the cache that was read; its lengths are those of the last windows.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    cache: KVCache

    @property
    def perplexity(self) -> float:
        """`exp(nats_per_token)`, which depends on the tokenizer; bits per byte do not."""
        return math.exp(self.nats_per_token)


def perplexity(model: Model, text: str, *, context: int, batch: int = 8) -> Perplexity:
    """Scores a text through the model's cache.

    The text is tokenised once and cut into consecutive windows of `context` tokens, the last of
    which may be shorter. Each window is read through an empty cache exactly as decoding would
    read it. Where the tokenizer adds a BOS, one stands in front of each window and every token is
    scored; otherwise the first token of each window is not.

    Args:
        model: with a tokenizer.
        text: any text; special tokens written out in it become their ids.
        context: tokens of a window, which is also the most that the cache ever holds.
        batch: windows scored at a time. It changes speed and memory, not the result.

    Raises:
        ValueError: an argument is invalid, or the text has no token to score.
        FloatingPointError: the model's logits are not finite.
    """
    tokenizer = _checked(model, context, batch)
    ids = tokenizer.encode_plain(text)
    outside = sorted({token for token in ids if token >= model.config.vocab_size})
    if outside:
        raise ValueError(
            f"the tokenizer gives ids outside the model's vocabulary of "
            f"{model.config.vocab_size}: {outside[:5]}"
        )
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    windows = [
        _Window.create(ids[begin : begin + context], bos) for begin in range(0, len(ids), context)
    ]
    scored_tokens = sum(len(window.targets) for window in windows)
    scored_bytes = len(text.encode())
    if bos is None:
        scored_bytes -= _bytes_at(tokenizer, text, ids, range(0, len(ids), context))
    if scored_tokens == 0 or scored_bytes <= 0:
        raise ValueError(f"the text has {len(ids)} tokens, none of which can be scored")
    longest = max(len(window.inputs) for window in windows)
    trained = model.config.max_position_embeddings
    if longest > trained:
        warnings.warn(
            f"scoring windows of {longest} tokens with a model made for {trained}; quality will "
            "suffer beyond",
            stacklevel=2,
        )
    # As many rounds as `batch` asks for, of equal size.
    batch = -(-len(windows) // -(-len(windows) // batch))
    nats, cache = 0.0, model.decoder.init_cache(batch=batch, max_length=longest)
    # disable=None shows the bar on a terminal only.
    with tqdm(total=scored_tokens, desc="Scoring", unit="token", disable=None) as progress:
        for begin in range(0, len(windows), batch):
            rows = windows[begin : begin + batch]
            row_nats, cache = _score(model.decoder, rows, cache, longest)
            if not np.all(np.isfinite(row_nats)):
                bad = begin + int(np.flatnonzero(~np.isfinite(row_nats))[0])
                raise FloatingPointError(
                    f"the logits of window {bad} are not finite; the weights may overflow in "
                    "this dtype"
                )
            nats += float(row_nats.sum())
            progress.update(sum(len(row.targets) for row in rows))
    return Perplexity(
        nats_per_token=nats / scored_tokens,
        bits_per_byte=nats / math.log(2) / scored_bytes,
        tokens=scored_tokens,
        bytes=scored_bytes,
        cache=cache,
    )


@dataclass(frozen=True)
class _Window:
    """Tokens to read and, for each, the token that should follow."""

    inputs: list[int]
    targets: list[int]

    @classmethod
    def create(cls, ids: list[int], bos: int | None) -> Self:
        before = [] if bos is None else [bos]
        return cls([*before, *ids[:-1]], ids[1 - len(before) :])


def _checked(model: Model, context: int, batch: int) -> Tokenizer:
    window = model.config.sliding_window
    if context < 2:
        raise ValueError(f"context={context} must be at least 2 tokens")
    if window is not None and context > window:
        raise ValueError(
            f"context={context} exceeds the model's sliding window of {window} tokens, which the "
            "cache does not implement"
        )
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer, so it cannot score a text")
    return model.tokenizer


def _bytes_at(tokenizer: Tokenizer, text: str, ids: list[int], indices: range) -> int:
    """UTF-8 bytes of the text that some of its tokens stand for."""
    pieces = tokenizer.token_bytes()
    total = 0
    offsets: list[tuple[int, int]] | None = None
    for index in indices:
        piece = pieces[ids[index]]
        if piece:
            # The space that the tokenizer puts before a text, as decoding takes it away again.
            dummy = tokenizer.stream().to_strip if index == 0 else 0
            total += len(piece) - min(dummy, len(piece) - len(piece.lstrip(b" ")))
            continue
        # Special and unknown tokens have no bytes of their own: ask what they were made from.
        if offsets is None:
            offsets = tokenizer.backend.encode(text, add_special_tokens=False).offsets
        begin, end = offsets[index]
        total += len(text[begin:end].encode())
    return total


def _score(
    decoder: Decoder, rows: list[_Window], cache: KVCache, longest: int
) -> tuple[np.ndarray, KVCache]:
    """Nats of each row, float64, and the cache. Donates `cache`, whose contents do not matter."""
    # What lies beyond a row's length is never read, so emptying a cache is forgetting lengths.
    cache = replace(cache, lengths=jnp.zeros_like(cache.lengths))
    sums = []
    for tokens, positions, targets in _chunks(rows, cache.batch, longest):
        chunk, cache = _score_chunk(decoder, tokens, positions, targets, cache)
        sums.append(chunk)
    return np.sum([np.asarray(chunk, np.float64) for chunk in sums], axis=0)[: len(rows)], cache


def _chunks(
    rows: list[_Window], batch: int, longest: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, positions and targets, int32 `[batch, width]`.

    The width depends on the longest window of the text alone, so that one shape compiles. Absent
    rows and what follows the end of a row have position -1.
    """
    block = max(1, LOGITS_BLOCK // batch)
    count = -(-longest // SCORE_CHUNK)
    width = -(-longest // (count * block)) * block
    tokens = np.zeros((batch, count * width), np.int32)
    targets = np.zeros_like(tokens)
    positions = np.full_like(tokens, -1)
    for index, row in enumerate(rows):
        length = len(row.inputs)
        tokens[index, :length] = row.inputs
        targets[index, :length] = row.targets
        positions[index, :length] = np.arange(length)
    for begin in range(0, count * width, width):
        part = slice(begin, begin + width)
        if np.any(positions[:, part] >= 0):
            yield tokens[:, part], positions[:, part], targets[:, part]


@partial(jax.jit, donate_argnames="cache")
def _score_chunk(
    decoder: Decoder,
    tokens: Int32[Array, "batch tokens"],
    positions: Int32[Array, "batch tokens"],
    targets: Int32[Array, "batch tokens"],
    cache: KVCache,
) -> tuple[Float32[Array, "batch"], KVCache]:
    """Negative log-likelihood of the targets, summed over each row's valid positions."""
    hidden, new_cache = decoder.hidden(tokens, positions, cache)
    assert new_cache is not None
    block = max(1, LOGITS_BLOCK // tokens.shape[0])

    def nats(part: tuple[Array, Array, Array]) -> Float32[Array, "batch"]:
        hidden, positions, targets = part
        logits = decoder.logits(hidden)
        wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - wanted
        return jnp.sum(jnp.where(positions >= 0, losses, 0.0), axis=1)

    parts = (
        rearrange(hidden, "b (n t) e -> n b t e", t=block),
        rearrange(positions, "b (n t) -> n b t", t=block),
        rearrange(targets, "b (n t) -> n b t", t=block),
    )
    return jnp.sum(jax.lax.map(nats, parts), axis=0), new_cache
