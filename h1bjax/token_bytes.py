"""Which bytes of a text each of its tokens stands for."""

import numpy as np
from jaxtyping import Int32, Int64

from h1bjax.tokenizer import Tokenizer


def token_sizes(
    tokenizer: Tokenizer, text: str
) -> tuple[Int32[np.ndarray, "tokens"], Int32[np.ndarray, "tokens"]]:
    """The token ids of a text, and the UTF-8 bytes of it that each stands for.

    The sizes add up to the bytes of the text: the space that SentencePiece-style tokenizers put
    in front is no byte of it, special and unknown tokens count as what they were made from, and
    where a tokenizer normalises the text, the difference is spread over the tokens.

    Raises:
        ValueError: the text has lone surrogates, or the tokenizer's decoder is unsupported.
    """
    ids = np.array(tokenizer.encode_plain(text), np.int32)
    pieces = tokenizer.token_bytes()
    sizes = np.array([len(piece) for piece in pieces], np.int64)[ids]
    # Tokens without bytes of their own: special and unknown ones.
    bare = np.flatnonzero(sizes == 0)
    if not bare.size:
        return ids, _fitted(tokenizer, pieces, ids, sizes, len(text.encode())).astype(np.int32)
    offsets = tokenizer.backend.encode(text, add_special_tokens=False).offsets
    sizes = sizes.copy()
    begin, position = 0, 0
    for index in [*bare, len(ids)]:
        start, end = offsets[index] if index < len(ids) else (len(text), len(text))
        between = len(text[position:start].encode())
        part = slice(begin, index)
        sizes[part] = _fitted(tokenizer, pieces, ids[part], sizes[part], between)
        if index < len(ids):
            sizes[index] = len(text[start:end].encode())
        begin, position = index + 1, end
    return ids, sizes.astype(np.int32)


def _fitted(
    tokenizer: Tokenizer,
    pieces: tuple[bytes, ...],
    ids: Int32[np.ndarray, "tokens"],
    sizes: Int64[np.ndarray, "tokens"],
    total: int,
) -> Int64[np.ndarray, "tokens"]:
    """Sizes of tokens between special ones, made to add up to the bytes of their text."""
    if not len(ids) or sizes.sum() == total:
        return sizes
    sizes = sizes.copy()
    piece = pieces[ids[0]]
    # The space that the tokenizer puts in front of a text, as decoding takes it away again.
    space = min(tokenizer.stream().to_strip, len(piece) - len(piece.lstrip(b" ")))
    sizes[0] -= np.clip(sizes.sum() - total, 0, space)
    ends = np.cumsum(sizes)
    whole = max(int(ends[-1]), 1)
    return np.diff((ends * total + whole // 2) // whole, prepend=0)
