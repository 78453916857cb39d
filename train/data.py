"""Text as one stream of tokens, and the windows of it that each step reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int32, Int64, UInt
from tqdm import tqdm

from h1bjax.tokenizer import Tokenizer

DOCUMENTS = 32
"""Documents that are tokenised at a time, in parallel."""


def pack(
    documents: Sequence[str], tokenizer: Tokenizer, *, vocab_size: int, end: int
) -> UInt[np.ndarray, "tokens"]:
    """The tokens of all documents in a row, each ended by one token.

    Where the tokenizer adds a BOS, every document begins with it. Special tokens written out in
    the text become their ids.

    Args:
        documents: in the order wanted.
        tokenizer: the model's.
        vocab_size: of the model.
        end: the token put after each document.

    Returns:
        uint16 where the vocabulary allows, uint32 otherwise.

    Raises:
        ValueError: a token is outside the model's vocabulary.
    """
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    begin = [tokenizer.bos_token_id] if tokenizer.adds_bos else []
    parts: list[np.ndarray] = []
    characters = sum(map(len, documents))
    # disable=None shows the bar on a terminal only.
    with tqdm(
        total=characters, desc="Tokenising", unit="char", unit_scale=True, disable=None
    ) as progress:
        for first in range(0, len(documents), DOCUMENTS):
            group = list(documents[first : first + DOCUMENTS])
            for encoding in tokenizer.backend.encode_batch_fast(group, add_special_tokens=False):
                ids = np.array([*begin, *encoding.ids, end], np.int64)
                outside = np.unique(ids[ids >= vocab_size])
                if outside.size:
                    raise ValueError(
                        f"the tokenizer gives ids outside the model's vocabulary of {vocab_size}: "
                        f"{outside[:5].tolist()}"
                    )
                parts.append(ids.astype(dtype))
            progress.update(sum(map(len, group)))
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class PackedText:
    """A stream cut into windows of `context + 1` tokens that overlap by one.

    So every token but the first is the target of exactly one window, except those at the end
    that fill no whole window.

    Attributes:
        stream: the tokens.
        context: tokens that a window's targets are predicted from.
    """

    stream: UInt[np.ndarray, "tokens"]
    context: int

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context={self.context} must be at least 1 token")
        if self.count < 1:
            raise ValueError(
                f"the text has {len(self.stream)} tokens, fewer than the {self.context + 1} of one "
                f"window; give more text or a smaller context than {self.context}"
            )

    @property
    def count(self) -> int:
        """The number of windows."""
        return (len(self.stream) - 1) // self.context

    def window(self, index: int) -> UInt[np.ndarray, "context_and_one"]:
        """One window."""
        begin = index * self.context
        return self.stream[begin : begin + self.context + 1]

    def batch(self, seed: int, step: int, size: int) -> Int32[np.ndarray, "size context_and_one"]:
        """The windows of one step: a pure function of its arguments.

        Steps read the windows in a new random order in each epoch, and a batch may end one epoch
        and begin the next.
        """
        places = range(step * size, (step + 1) * size)
        indices = [
            _order(seed, place // self.count, self.count)[place % self.count] for place in places
        ]
        return np.stack([self.window(index) for index in indices]).astype(np.int32)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "count"]:
    return np.random.default_rng([seed, epoch]).permutation(count)
