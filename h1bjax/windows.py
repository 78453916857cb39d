"""Text cut into the windows of tokens that an evaluation reads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from jaxtyping import Bool, Int32

from h1bjax.token_bytes import token_sizes
from h1bjax.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens to read, and for each of them the token that should follow.

    Rows are right-padded to the longest.

    Attributes:
        inputs: token ids that are read.
        targets: the ids that follow them.
        target_bytes: UTF-8 bytes of the text that each target stands for.
        lengths: how many inputs of each row are no padding.
        context: tokens of a full window.
        bos: whether each row's first input is a BOS in front of the window, so that all of the
            window's tokens are targets; otherwise all but the first are.
    """

    inputs: Int32[np.ndarray, "windows tokens"]
    targets: Int32[np.ndarray, "windows tokens"]
    target_bytes: Int32[np.ndarray, "windows tokens"]
    lengths: Int32[np.ndarray, "windows"]
    context: int
    bos: bool

    @classmethod
    def create(
        cls, rows: Sequence[tuple[np.ndarray, np.ndarray]], context: int, bos: int | None
    ) -> Self:
        """Windows of these token ids and their bytes.

        Args:
            rows: of each window the ids, at most `context`, and the bytes of each.
            context: tokens of a full window.
            bos: the id that stands in front of each window; None for nothing.
        """
        before = [] if bos is None else [bos]
        first = 1 - len(before)
        lengths = np.array([len(ids) - first for ids, _ in rows], np.int32)
        shape = (len(rows), int(lengths.max(initial=0)))
        inputs, targets, target_bytes = (np.zeros(shape, np.int32) for _ in range(3))
        for row, (length, (ids, sizes)) in enumerate(zip(lengths, rows, strict=True)):
            inputs[row, :length] = [*before, *ids[:-1]]
            targets[row, :length] = ids[first:]
            target_bytes[row, :length] = sizes[first:]
        return cls(inputs, targets, target_bytes, lengths, context, bos is not None)

    def first(self, count: int) -> Self:
        """The first windows alone."""
        return replace(
            self,
            inputs=self.inputs[:count],
            targets=self.targets[:count],
            target_bytes=self.target_bytes[:count],
            lengths=self.lengths[:count],
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Inputs of the longest row."""
        return self.inputs.shape[1]

    @property
    def scored(self) -> Bool[np.ndarray, "windows tokens"]:
        """Which targets are no padding."""
        return np.arange(self.longest) < self.lengths[:, None]

    @property
    def late(self) -> Bool[np.ndarray, "windows tokens"]:
        """Which targets lie in the last quarter of a full window."""
        index = np.arange(self.longest) + (0 if self.bos else 1)
        return self.scored & (4 * index >= 3 * self.context)


def text_windows(
    tokenizer: Tokenizer,
    vocab_size: int,
    text: str | Sequence[str],
    *,
    context: int,
    tokens: int | None = None,
) -> Windows:
    """Consecutive windows of a text or of several documents.

    Documents are tokenised apart, and no window spans two of them; the last of each may be
    shorter. Where the tokenizer adds a BOS, one stands in front of each window and every token is
    a target; otherwise the first token of each window is none.

    Args:
        tokenizer: the model's.
        vocab_size: the model's.
        text: special tokens written out in it become their ids.
        context: tokens of a full window.
        tokens: takes the first windows that together have at most as many tokens; None takes all.

    Raises:
        ValueError: an argument is invalid, or there is no token to predict.
    """
    if context < 2:
        raise ValueError(f"context={context} must be at least 2 tokens")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    documents = [text] if isinstance(text, str) else text
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    rows, read, taken = [], 0, 0
    for ids, sizes in tokenise(tokenizer, vocab_size, documents):
        cuts = range(0, len(ids), context)
        read += len(ids)
        for row in ((ids[cut : cut + context], sizes[cut : cut + context]) for cut in cuts):
            if tokens is not None and taken + len(row[0]) > tokens:
                break
            taken += len(row[0])
            rows.append(row)
        if tokens is not None and taken < read:
            break
    first = 0 if bos is not None else 1
    windows = Windows.create([row for row in rows if len(row[0]) > first], context, bos)
    if not np.any(windows.target_bytes):
        limit = "" if tokens is None else f" in whole windows of {context} among the first {tokens}"
        raise ValueError(f"the text has {read} tokens, none of which can be scored{limit}")
    return windows


def tokenise(
    tokenizer: Tokenizer, vocab_size: int, documents: Sequence[str]
) -> Iterator[tuple[Int32[np.ndarray, "tokens"], Int32[np.ndarray, "tokens"]]]:
    """The ids of each document, and the UTF-8 bytes of it that each id stands for.

    Raises:
        ValueError: an id lies outside the model's vocabulary.
    """
    for document in documents:
        ids, sizes = token_sizes(tokenizer, document)
        if np.any(ids >= vocab_size):
            outside = np.unique(ids[ids >= vocab_size])
            raise ValueError(
                f"the tokenizer gives ids outside the model's vocabulary of {vocab_size}: "
                f"{outside[:5].tolist()}"
            )
        yield ids, sizes
