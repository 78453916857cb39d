"""Retrieval: what is repeated, how far behind, and that exactly the repetition is scored."""

import math
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from toy import load_quietly

from h1bjax import retrieval
from h1bjax.retrieval import ANNOUNCED, copy_score, copy_task, key_value_score, key_value_task

pytestmark = pytest.mark.once


CONTEXT = 128
PASSAGE = CONTEXT // 8
DOCUMENTS = [
    "".join(f"the {number} ended. " for number in range(begin, begin + 40)) for begin in (100, 300)
]


@pytest.fixture(params=["toy_folder", "bos_folder"])
def model(request):
    return load_quietly(request.getfixturevalue(request.param))


def copies(model, documents=DOCUMENTS, **options):
    chosen = {"context": CONTEXT, "windows": 3, "seed": 0, **options}
    return copy_task(model.tokenizer, model.config.vocab_size, documents, **chosen)


def key_values(model, **options):
    chosen = {"context": 500, "windows": 3, "seed": 0, **options}
    return key_value_task(model.tokenizer, model.config.vocab_size, **chosen)


def tokens_of(windows, row):
    """The tokens of a window, without a BOS."""
    length = windows.lengths[row]
    first = [] if windows.bos else [windows.inputs[row, 0]]
    return [*first, *windows.targets[row, :length]]


def float64_nats(model, windows):
    """The definition, one window at a time, without a cache, and the most probable tokens."""
    nats, best = np.zeros(windows.targets.shape), np.zeros(windows.targets.shape, int)
    for row, length in enumerate(windows.lengths):
        index = np.arange(windows.longest)
        positions = np.where(index < length, index, -1).astype(np.int32)
        logits, _ = model.decoder(
            jnp.asarray(windows.inputs[row : row + 1]), jnp.asarray(positions[None])
        )
        logits = np.asarray(logits[0], np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        wanted = np.take_along_axis(shifted, windows.targets[row][:, None], axis=1)[:, 0]
        nats[row] = np.log(np.exp(shifted).sum(axis=1)) - wanted
        best[row] = logits.argmax(axis=1)
    return nats, best


# Copying


def test_a_window_ends_with_the_passage_that_it_began_with(model):
    windows = copies(model).windows
    for row in range(3):
        tokens = tokens_of(windows, row)
        assert len(tokens) == CONTEXT
        assert tokens[:PASSAGE] == tokens[-PASSAGE:]


def test_both_texts_come_from_the_documents_and_do_not_overlap(model):
    everything = np.concatenate([model.tokenizer.encode_plain(text) for text in DOCUMENTS])
    windows = copies(model, windows=20).windows

    def places(piece):
        views = np.lib.stride_tricks.sliding_window_view(everything, len(piece))
        return set(np.flatnonzero(np.all(views == piece, axis=1)).tolist())

    for row in range(20):
        tokens = tokens_of(windows, row)
        passages = places(tokens[:PASSAGE])
        # Long enough to be in one place only.
        (other,) = places(tokens[PASSAGE:-PASSAGE])
        between = CONTEXT - 2 * PASSAGE
        assert any(at + PASSAGE <= other or other + between <= at for at in passages)


def test_the_repetition_is_scored_after_its_first_tokens(model):
    task = copies(model)
    shift = 0 if task.windows.bos else 1
    for row in range(3):
        again = [index + shift for index in np.flatnonzero(task.repeated[row])]
        first = [index + shift for index in np.flatnonzero(task.first[row])]
        assert again == list(range(CONTEXT - PASSAGE + ANNOUNCED, CONTEXT))
        assert first == list(range(ANNOUNCED, PASSAGE))
    targets = task.windows.targets
    assert targets[task.first].tolist() == targets[task.repeated].tolist()


def test_the_copy_score_is_the_definition_in_float64(model):
    score = copy_score(model, DOCUMENTS, context=CONTEXT, windows=3, batch=2)
    task = copies(model)
    nats, _ = float64_nats(model, task.windows)
    for loss, chosen in [(score.first, task.first), (score.repeated, task.repeated)]:
        size = task.windows.target_bytes[chosen].sum()
        assert loss.tokens == 3 * (PASSAGE - ANNOUNCED)
        assert loss.bytes == size > 0
        assert loss.nats == pytest.approx(nats[chosen].sum(), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats[task.repeated].sum() / math.log(2) / size)


def test_what_was_read_first_counts(toy_folder):
    model = load_quietly(toy_folder)
    task = copies(model)
    scrambled = task.windows.inputs.copy()
    scrambled[:, :PASSAGE] = scrambled[:, :PASSAGE][:, ::-1]
    other = replace(task, windows=replace(task.windows, inputs=scrambled))
    plain = retrieval.score_copies(model.decoder, task, batch=3)
    changed = retrieval.score_copies(model.decoder, other, batch=3)
    assert changed.bits_per_byte != pytest.approx(plain.bits_per_byte, rel=1e-4)


# Key-value lines


def test_lines_fill_the_context_and_end_with_repetitions(model):
    windows = key_values(model).windows
    for row in range(3):
        tokens = tokens_of(windows, row)
        lines = model.tokenizer.decode([int(token) for token in tokens]).splitlines()
        assert all(re.fullmatch(r"The code of [a-z]{6} is [1-9]\d{4}\.", line) for line in lines)
        told, asked = lines[: -(len(lines) // 8)], lines[-(len(lines) // 8) :]
        assert len(set(told)) == len({line.split()[3] for line in told}) == len(told)
        assert len(set(asked)) == len(asked)
        assert set(asked) < set(told)
        # One more line would not have fitted.
        cost = len(model.tokenizer.encode_plain(lines[0] + "\n"))
        assert 500 - cost < len(tokens) <= 500


def test_the_answers_are_the_digits_of_the_repetitions(model):
    task = key_values(model)
    for row in range(3):
        tokens = [int(token) for token in tokens_of(task.windows, row)]
        lines = model.tokenizer.decode(tokens).splitlines()
        asked = lines[-(len(lines) // 8) :]
        answers = task.windows.targets[row][task.answers[row]].tolist()
        # Digits are tokens of their own here.
        assert model.tokenizer.decode(answers) == "".join(line[-6:-1] for line in asked)
        assert task.windows.target_bytes[row][task.answers[row]].sum() == 5 * len(asked)


def test_the_key_value_score_is_the_definition_in_float64(model):
    score = key_value_score(model, context=500, windows=3, batch=2)
    task = key_values(model)
    nats, best = float64_nats(model, task.windows)
    assert score.answers.tokens == task.answers.sum()
    assert score.answers.nats == pytest.approx(nats[task.answers].sum(), rel=1e-5)
    hits = (best == task.windows.targets)[task.answers]
    assert score.accuracy == pytest.approx(hits.mean())
    assert score.bits_per_byte == pytest.approx(
        nats[task.answers].sum() / math.log(2) / score.answers.bytes
    )


# Both


@pytest.mark.parametrize("make", [copies, key_values])
def test_a_seed_chooses_the_windows(toy_folder, make):
    model = load_quietly(toy_folder)
    first, again, other = (make(model, seed=seed).windows.inputs for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (copies, {"context": 71}, "context=71 is too short .* at least 72"),
        (copies, {"windows": 0}, "windows=0 must be at least 1"),
        (copies, {"documents": ["the end"]}, r"needs at least 208 tokens of text; there are \d"),
        (copies, {"documents": []}, "needs at least 208 tokens of text; there are 0"),
        (key_values, {"windows": 0}, "windows=0 must be at least 1"),
        (key_values, {"context": 20}, r"context=20 is too short for a line and its repetition, \d"),
    ],
)
def test_bad_arguments_are_named(toy_folder, make, options, message):
    with pytest.raises(ValueError, match=message):
        make(load_quietly(toy_folder), **options)


def test_the_least_text_is_enough_wherever_the_passage_falls(toy_folder):
    model = load_quietly(toy_folder)
    (text,) = [DOCUMENTS[0][:208]]
    assert len(model.tokenizer.encode_plain(text)) < 208
    while len(model.tokenizer.encode_plain(text)) < 208:
        text += "x"
    assert len(copies(model, [text], windows=50).windows) == 50


def test_scores_need_a_tokenizer(untokenized_folder):
    model = load_quietly(untokenized_folder)
    with pytest.raises(ValueError, match="no tokenizer"):
        copy_score(model, DOCUMENTS, context=CONTEXT)
    with pytest.raises(ValueError, match="no tokenizer"):
        key_value_score(model, context=CONTEXT)
