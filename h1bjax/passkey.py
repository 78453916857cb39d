"""Passkey retrieval: a number hidden somewhere in a long text, asked for at its end.

After Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300): filler text of no content, in
which one line states a number, and the question. With real text as filler it is the needle in a
haystack. The question is the beginning of that line, so that a model needs no training to follow
instructions: it is to copy. A grid of context lengths and depths shows from how far back a cache
still serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from h1bjax.decoder import Decoder
from h1bjax.retrieval import Line, key_value_lines
from h1bjax.tokenizer import Tokenizer
from h1bjax.window_scores import score_windows
from h1bjax.windows import Windows, tokenise

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
"""Text of no content, in which nothing tells one place from another."""

DIGITS = 5
"""Digits of a number."""


@dataclass(frozen=True, eq=False)
class PasskeyTask:
    """Windows that end with the number that they hide.

    Attributes:
        windows: what is read, in the order of `depth`.
        answers: which targets belong to the number at the end.
        depth: of each window, the index of its depth.
        depths: where the number stands: 0 at the text's beginning, 1 at its end.
    """

    windows: Windows
    answers: Bool[np.ndarray, "windows tokens"]
    depth: Int32[np.ndarray, "windows"]
    depths: tuple[float, ...]


@dataclass(frozen=True)
class PasskeyScore:
    """How well the numbers were found.

    Attributes:
        found: by depth, the share of numbers all of whose tokens were the most probable ones, so
            that greedy decoding would give the number.
        nats_per_digit: by depth, the numbers' negative log-likelihood over their digits.
    """

    found: tuple[float, ...]
    nats_per_digit: tuple[float, ...]


def passkey_task(
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    context: int,
    depths: Sequence[float],
    windows: int,
    seed: int,
    filler: Sequence[str] = (FILLER,),
) -> PasskeyTask:
    """Windows of at most `context` tokens without a BOS, and hardly fewer.

    Args:
        tokenizer: the model's.
        vocab_size: the model's.
        context: tokens of a window.
        depths: from 0 to 1.
        windows: how many for each depth.
        seed: of the numbers, and of where in the filler each window begins.
        filler: texts between whose lines or sentences the number stands, in a line "The code of
            <name> is <five digits>."; they repeat as often as the context needs.

    Raises:
        ValueError: an argument is invalid, or the context is too short.
    """
    if windows < 1:
        raise ValueError(f"windows={windows} must be at least 1")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={list(depths)} must be numbers from 0 to 1, at least one")
    units = _units(filler)
    if not units:
        raise ValueError("the filler has no text")
    sizes = np.array([max(1, len(tokenizer.encode_plain(unit))) for unit in units])
    generator = np.random.default_rng(seed)
    rows, chosen, places = [], [], []
    for index, depth in enumerate(depths):
        for _ in range(windows):
            (line,) = key_value_lines(1, generator)
            start = int(generator.integers(len(units)))
            text = _text(tokenizer, units, sizes, context, depth, line, start)
            ((ids, lengths),) = tokenise(tokenizer, vocab_size, [text])
            # The last bytes of the text are the number.
            after = lengths.sum() - np.cumsum(lengths)
            rows.append((ids, lengths))
            chosen.append((after < DIGITS) & (lengths > 0))
            places.append(index)
    made = Windows.create(rows, context, tokenizer.bos_token_id if tokenizer.adds_bos else None)
    first = 0 if made.bos else 1
    answers = np.zeros(made.targets.shape, bool)
    for row, mask in enumerate(chosen):
        answers[row, : len(mask) - first] = mask[first:]
    return PasskeyTask(made, answers, np.array(places, np.int32), tuple(depths))


def score_passkeys(
    decoder: Decoder, task: PasskeyTask, *, batch: int, length: int | None = None
) -> PasskeyScore:
    """Scores a task. See `score_windows` for the other arguments.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    scores = score_windows(decoder, task.windows, batch=batch, length=length)
    whole = np.all(scores.correct | ~task.answers, axis=1)
    nats = np.sum(scores.nats, axis=1, where=task.answers) / DIGITS
    rows = [task.depth == index for index in range(len(task.depths))]
    return PasskeyScore(
        tuple(float(whole[row].mean()) for row in rows),
        tuple(float(nats[row].mean()) for row in rows),
    )


def _units(filler: Sequence[str]) -> list[str]:
    """Pieces of text between which a sentence can stand: lines, or the sentences of long ones."""
    units = []
    for text in filler:
        for line in text.splitlines(keepends=True):
            parts = line.replace(". ", ".\0").split("\0") if len(line) > 200 else [line]
            units += [part if part.endswith("\n") else f"{part} " for part in parts if part.strip()]
    return units


def _text(
    tokenizer: Tokenizer,
    units: Sequence[str],
    sizes: np.ndarray,
    context: int,
    depth: float,
    line: Line,
    start: int,
) -> str:
    """The longest text of at most `context` tokens."""

    def text(count: int) -> str:
        around = [units[(start + index) % len(units)] for index in range(count)]
        place = round(depth * count)
        return "".join([*around[:place], line.text, *around[place:], line.text[: -len(".\n")]])

    def fits(count: int) -> bool:
        return len(tokenizer.encode_plain(text(count))) <= context

    least = len(tokenizer.encode_plain(text(1)))
    if least > context:
        raise ValueError(
            f"context={context} is too short to hide a number in: {least} tokens are needed"
        )
    # An estimate from the units' own sizes, corrected by whole texts.
    ends = np.cumsum(np.resize(np.roll(sizes, -start), context))
    count = max(1, int(np.searchsorted(ends, context - least)))
    while fits(count + 1):
        count += 1
    while count > 1 and not fits(count):
        count -= 1
    return text(count)
