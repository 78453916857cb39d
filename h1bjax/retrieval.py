"""Long-range retrieval: how well a model finds again what it read far back in its cache.

Bits per byte of a text hardly notice when the far context is lost, because little of a text
depends on it. These two scores consist of nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from h1bjax.decoder import Decoder
from h1bjax.evaluate import evaluation_tokenizer
from h1bjax.model import Model
from h1bjax.tokenizer import Tokenizer
from h1bjax.window_scores import Loss, score_windows
from h1bjax.windows import Windows, tokenise

ANNOUNCED = 8
"""The first tokens of a repeated passage, which tell what is repeated and are not scored."""

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = 3
_DIGITS = 5


@dataclass(frozen=True, eq=False)
class CopyTask:
    """Windows that end by repeating the passage with which they begin.

    Attributes:
        windows: what is read.
        first: which targets belong to the passage when it is read first.
        repeated: the same tokens when it is read again.
    """

    windows: Windows
    first: Bool[np.ndarray, "windows tokens"]
    repeated: Bool[np.ndarray, "windows tokens"]


@dataclass(frozen=True)
class CopyScore:
    """How well repeated passages were predicted.

    Attributes:
        first: the loss of the passages when they were read first.
        repeated: the loss of the same tokens when they were read again.
    """

    first: Loss
    repeated: Loss

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the repeated passages, the score."""
        return self.repeated.bits_per_byte


@dataclass(frozen=True, eq=False)
class KeyValueTask:
    """Windows of lines that name a code, and then of some of these lines again.

    Attributes:
        windows: what is read.
        answers: which targets belong to the digits of a line that is repeated.
    """

    windows: Windows
    answers: Bool[np.ndarray, "windows tokens"]


@dataclass(frozen=True)
class KeyValueScore:
    """How well the codes were found again.

    Attributes:
        answers: the loss of the tokens of the repeated digits.
        accuracy: the share of these tokens that were the most probable ones.
    """

    answers: Loss
    accuracy: float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the repeated digits."""
        return self.answers.bits_per_byte


def copy_score(
    model: Model,
    documents: Sequence[str],
    *,
    context: int,
    windows: int = 32,
    seed: int = 0,
    batch: int = 8,
) -> CopyScore:
    """Scores passages of held-out text that are repeated far behind. See `copy_task`.

    Args:
        model: with a tokenizer.
        documents: text that the model was not trained on.
        context: tokens of a window.
        windows: how many.
        seed: of the choice of passages.
        batch: windows scored at a time. It changes speed and memory, not the result.

    Raises:
        ValueError: an argument is invalid, or there is too little text.
        FloatingPointError: the model's logits are not finite.
    """
    tokenizer = evaluation_tokenizer(model, context, batch)
    vocab_size = model.config.vocab_size
    task = copy_task(tokenizer, vocab_size, documents, context=context, windows=windows, seed=seed)
    return score_copies(model.decoder, task, batch=min(batch, windows))


def key_value_score(
    model: Model, *, context: int, windows: int = 32, seed: int = 0, batch: int = 8
) -> KeyValueScore:
    """Scores the digits of lines that are repeated behind many others. See `key_value_task`.

    Args:
        model: with a tokenizer.
        context: tokens of a window.
        windows: how many.
        seed: of names, digits and questions.
        batch: windows scored at a time. It changes speed and memory, not the result.

    Raises:
        ValueError: an argument is invalid, or the context is too short for two lines.
        FloatingPointError: the model's logits are not finite.
    """
    tokenizer = evaluation_tokenizer(model, context, batch)
    vocab_size = model.config.vocab_size
    task = key_value_task(tokenizer, vocab_size, context=context, windows=windows, seed=seed)
    return score_key_values(model.decoder, task, batch=min(batch, windows))


def copy_task(
    tokenizer: Tokenizer,
    vocab_size: int,
    documents: Sequence[str],
    *,
    context: int,
    windows: int,
    seed: int,
) -> CopyTask:
    """Windows of [passage][other text][the same passage], `context` tokens without a BOS.

    A passage has `context // 8` tokens, so that its two places are more than half of the context
    apart. Both texts are consecutive tokens of the documents, joined, and do not overlap.

    Raises:
        ValueError: an argument is invalid, or there is too little text.
    """
    _check_count(windows)
    passage = context // 8
    between = context - 2 * passage
    if passage <= ANNOUNCED:
        raise ValueError(
            f"context={context} is too short to repeat a passage of more than {ANNOUNCED} tokens "
            f"in: it must be at least {8 * (ANNOUNCED + 1)}"
        )
    tokenised = list(tokenise(tokenizer, vocab_size, documents))
    ids = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in tokenised)])
    sizes = np.concatenate([np.zeros(0, np.int32), *(sizes for _, sizes in tokenised)])
    if len(ids) < passage + 2 * between:
        raise ValueError(
            f"copying in windows of {context} tokens needs at least {passage + 2 * between} "
            f"tokens of text; there are {len(ids)}"
        )
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(windows):
        start = int(generator.integers(len(ids) - passage + 1))
        # Where the other text can begin: in front of the passage, then behind it.
        before = max(0, start - between + 1)
        after = max(0, len(ids) - between - start - passage + 1)
        other = int(generator.integers(before + after))
        other += start + passage - before if other >= before else 0
        parts = (slice(start, start + passage), slice(other, other + between))
        order = [parts[0], parts[1], parts[0]]
        rows.append(
            tuple(np.concatenate([array[part] for part in order]) for array in (ids, sizes))
        )
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    made = Windows.create([(ids, sizes) for ids, sizes in rows], context, bos)
    # Where in its window each target lies.
    place = np.arange(made.longest) + (0 if made.bos else 1)
    chosen = np.broadcast_to(place % (context - passage), made.targets.shape)
    copied = (chosen >= ANNOUNCED) & (chosen < passage)
    early = place < passage
    return CopyTask(made, made.scored & copied & early, made.scored & copied & ~early)


def score_copies(
    decoder: Decoder, task: CopyTask, *, batch: int, length: int | None = None
) -> CopyScore:
    """Scores a task. See `score_windows` for the other arguments.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    scores = score_windows(decoder, task.windows, batch=batch, length=length)
    first = Loss.create(task.windows, scores, task.first)
    repeated = Loss.create(task.windows, scores, task.repeated)
    assert first is not None and repeated is not None, "copy_task makes no empty passage"
    return CopyScore(first, repeated)


def key_value_task(
    tokenizer: Tokenizer, vocab_size: int, *, context: int, windows: int, seed: int
) -> KeyValueTask:
    """Windows of lines "The code of <name> is <five digits>.", of at most `context` tokens.

    Names and digits are random. An eighth of the lines repeat earlier ones, drawn at random, at
    the window's end; their digits are the answers. There are as many lines as fit.

    Raises:
        ValueError: an argument is invalid, or the context is too short for two lines.
    """
    _check_count(windows)
    generator = np.random.default_rng(seed)
    rows = [_key_value_row(tokenizer, vocab_size, context, generator) for _ in range(windows)]
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    made = Windows.create([(ids, sizes) for ids, sizes, _ in rows], context, bos)
    answers = np.zeros(made.targets.shape, bool)
    first = 0 if made.bos else 1
    for index, (_, _, chosen) in enumerate(rows):
        answers[index, : len(chosen) - first] = chosen[first:]
    return KeyValueTask(made, answers)


def score_key_values(
    decoder: Decoder, task: KeyValueTask, *, batch: int, length: int | None = None
) -> KeyValueScore:
    """Scores a task. See `score_windows` for the other arguments.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    scores = score_windows(decoder, task.windows, batch=batch, length=length)
    answers = Loss.create(task.windows, scores, task.answers)
    assert answers is not None, "key_value_task makes no window without a question"
    return KeyValueScore(answers, float(scores.correct[task.answers].mean()))


def _check_count(windows: int) -> None:
    if windows < 1:
        raise ValueError(f"windows={windows} must be at least 1")


def _key_value_row(
    tokenizer: Tokenizer, vocab_size: int, context: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and bytes of one window, and which of its tokens are answers."""
    lines = key_value_lines(context, generator)
    # The lines with the smallest of these are asked for.
    order = generator.random(len(lines))

    def parts(count: int) -> tuple[list[Line], list[Line]]:
        questions = max(1, count // 8)
        told = lines[: count - questions]
        return told, [told[index] for index in np.argsort(order[: len(told)])[:questions]]

    def text(count: int) -> str:
        told, asked = parts(count)
        return "".join(line.text for line in [*told, *asked])

    def fits(count: int) -> bool:
        return len(tokenizer.encode_plain(text(count))) <= context

    count = max(2, min(len(lines), context // len(tokenizer.encode_plain(lines[0].text))))
    while count < len(lines) and fits(count + 1):
        count += 1
    while count >= 2 and not fits(count):
        count -= 1
    if count < 2:
        raise ValueError(
            f"context={context} is too short for a line and its repetition, "
            f"{len(tokenizer.encode_plain(text(2)))} tokens"
        )
    ((ids, sizes),) = tokenise(tokenizer, vocab_size, [text(count)])
    told, asked = parts(count)
    # Everything is ASCII, so that characters are bytes.
    position = sum(len(line.text) for line in told)
    ends = np.cumsum(sizes)
    chosen = np.zeros(len(ids), bool)
    for line in asked:
        begin = position + line.code
        chosen |= (ends > begin) & (ends - sizes < begin + _DIGITS)
        position += len(line.text)
    return ids, sizes, chosen


@dataclass(frozen=True)
class Line:
    """A line, and the index in it of its code's first digit."""

    text: str
    code: int


def key_value_lines(count: int, generator: np.random.Generator) -> list[Line]:
    """Lines of different names."""
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    base = len(syllables)
    lines = []
    for name in generator.choice(base**_SYLLABLES, count, replace=False):
        indices = np.unravel_index(name, (base,) * _SYLLABLES)
        before = f"The code of {''.join(syllables[index] for index in indices)} is "
        code = int(generator.integers(10 ** (_DIGITS - 1), 10**_DIGITS))
        lines.append(Line(f"{before}{code}.\n", len(before)))
    return lines
