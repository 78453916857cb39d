"""The documented formulas once more, in float64 numpy, sharing no code with the library."""

import numpy as np


def places(fields: int, width: int) -> list[tuple[int, int, int, int]]:
    """`(field, bit of the field, word, bit of the word)` for every bit of one packed column."""
    result = []
    first_word = 0
    low = 0
    for bits in (2, 1) if width == 3 else (width,):
        words = -(-fields * bits // 32)
        for field in range(fields):
            plane, rest = divmod(field, 4 * words)
            word, byte = divmod(rest, 4)
            for bit in range(bits):
                result.append((field, low + bit, first_word + word, 8 * byte + bits * plane + bit))
        first_word += words
        low += bits
    return result


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Packs codes along the last axis into int32 words."""
    layout = places(codes.shape[-1], width)
    words = np.zeros((*codes.shape[:-1], 1 + max(word for _, _, word, _ in layout)), np.uint32)
    for field, field_bit, word, word_bit in layout:
        words[..., word] |= ((codes[..., field] >> field_bit) & 1).astype(np.uint32) << word_bit
    return words.view(np.int32)


def rotate(x: np.ndarray, position: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Turns channel pairs `(i, i + D/2)` of `x` by `position · frequencies[i]` radians."""
    half = x.shape[-1] // 2
    angle = np.asarray(position, np.float64)[..., None] * np.asarray(frequencies, np.float64)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax_attention(
    logits: np.ndarray, visible: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, float]:
    """Output and log-sum-exp of one query over the visible keys; 0 and -inf where there is none."""
    if not visible.any():
        return np.zeros(values.shape[-1]), -np.inf
    seen = np.asarray(logits, np.float64)[visible]
    weights = np.exp(seen - seen.max())
    total = weights.sum()
    return weights @ values[visible] / total, seen.max() + np.log(total)


def assert_near(
    found, output: np.ndarray, lse: np.ndarray, tolerance: float, *, rtol: float, atol: float
) -> None:
    """Holds an attention to an answer; rows that see nothing are 0, and known as such.

    Args:
        found: its output and log-sum-exp.
        output: the answer's.
        lse: likewise.
        tolerance: error of the output as a whole.
        rtol: of each log-sum-exp.
        atol: likewise.
    """
    error = np.linalg.norm(found.output - output)
    assert error <= tolerance * np.linalg.norm(output)
    empty = np.isneginf(lse)
    assert (np.isneginf(found.lse) == empty).all()
    assert (np.asarray(found.output)[empty] == 0).all()
    np.testing.assert_allclose(np.asarray(found.lse)[~empty], lse[~empty], rtol=rtol, atol=atol)
