"""Passkeys: where they stand, what is scored, and the picture of it."""

import re

import numpy as np
import pytest
from test_retrieval import float64_nats, tokens_of
from toy import load_quietly

from h1bjax.passkey import DIGITS, passkey_task, score_passkeys
from h1bjax.retrieval_grid import RetrievalScores, retrieval_grid, score_caches

pytestmark = pytest.mark.once

CONTEXT = 500
DEPTHS = (0.0, 0.5, 1.0)
NEEDLE = re.compile(r"(The code of [a-z]{6} is [1-9]\d{4})\.\n")


@pytest.fixture(params=["toy_folder", "bos_folder"])
def model(request):
    return load_quietly(request.getfixturevalue(request.param))


def task_of(model, **options):
    chosen = {"context": CONTEXT, "depths": DEPTHS, "windows": 2, "seed": 0, **options}
    return passkey_task(model.tokenizer, model.config.vocab_size, **chosen)


def texts_of(model, task):
    return [
        model.tokenizer.decode([int(token) for token in tokens_of(task.windows, row)])
        for row in range(len(task.windows))
    ]


def test_a_window_hides_the_number_with_which_it_ends(model):
    task = task_of(model)
    assert task.depth.tolist() == [0, 0, 1, 1, 2, 2]
    keys = set()
    for text, depth in zip(texts_of(model, task), task.depth, strict=True):
        (needle,) = NEEDLE.finditer(text)
        assert text.endswith(f"\n{needle[1]}")
        filler = len(text) - len(needle[0]) - len(needle[1])
        assert needle.start() / filler == pytest.approx(DEPTHS[depth], abs=0.15)
        keys.add(needle[1])
    assert len(keys) == 6


def test_windows_are_nearly_full(model):
    task = task_of(model, context=700)
    lengths = task.windows.lengths + (0 if task.windows.bos else 1)
    assert np.all(lengths <= 700)
    # Another line of filler would not have fitted.
    assert np.all(lengths > 700 - 100)


def test_the_answer_is_the_number_alone(model):
    task = task_of(model)
    for row, text in enumerate(texts_of(model, task)):
        answer = task.windows.targets[row][task.answers[row]].tolist()
        assert model.tokenizer.decode(answer) == text[-DIGITS:]


def test_other_text_can_be_the_filler(model):
    task = task_of(model, filler=["the tale of one. " * 20 + "\nthe end\n"])
    for text in texts_of(model, task):
        assert "the tale of one. " in text
        assert "grass" not in text
        assert NEEDLE.search(text)


def test_the_score_is_the_definition_in_float64(model):
    task = task_of(model)
    score = score_passkeys(model.decoder, task, batch=4)
    nats, best = float64_nats(model, task.windows)
    for index in range(len(DEPTHS)):
        rows = np.flatnonzero(task.depth == index)
        losses = [nats[row][task.answers[row]].sum() / DIGITS for row in rows]
        hits = [np.all((best == task.windows.targets)[row][task.answers[row]]) for row in rows]
        assert score.nats_per_digit[index] == pytest.approx(np.mean(losses), rel=1e-5)
        assert score.found[index] == np.mean(hits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "windows=0 must be at least 1"),
        ({"depths": ()}, r"depths=\[\] must be numbers from 0 to 1"),
        ({"depths": (0.5, 1.1)}, r"depths=\[0.5, 1.1\] must be numbers from 0 to 1"),
        ({"context": 50}, r"context=50 is too short to hide a number in: \d+ tokens"),
        ({"filler": ["\n"]}, "the filler has no text"),
    ],
)
def test_bad_arguments_are_named(toy_folder, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(load_quietly(toy_folder), **options)


# The grid


def test_caches_are_scored_on_the_same_tasks(toy_folder):
    model = load_quietly(toy_folder)
    grid = retrieval_grid(model, [700, 500, 700], depths=3, windows=1)
    assert (grid.contexts, grid.depths) == ((500, 700), DEPTHS)
    first, second = score_caches(grid, [model, model], batch=3)
    assert first == second
    assert first.preset == "exact"
    assert first.passkeys[0] == score_passkeys(model.decoder, grid.passkeys[0], batch=3)


@pytest.mark.parametrize(
    ("contexts", "options", "message"),
    [
        ([], {}, "give a context"),
        ([500], {"depths": 1}, "2 depths"),
        ([500, 2000], {}, "context=2000 exceeds the 1024 tokens of the model"),
    ],
)
def test_a_bad_grid_is_refused(toy_folder, contexts, options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_grid(load_quietly(toy_folder), contexts, **options)


def test_a_heat_map_has_a_column_for_each_cache(toy_folder, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from h1bjax.heat_map import draw_heat_map

    model = load_quietly(toy_folder)
    grid = retrieval_grid(model, [500], depths=3, windows=1)
    (score,) = score_caches(grid, [model], batch=3)
    widths = []
    for count in (1, 3, 7):
        scores = [
            RetrievalScores(f"cache {index}", 86, score.passkeys, score.key_values)
            for index in range(count)
        ]
        path = tmp_path / f"{count}.png"
        draw_heat_map(grid, scores, path)
        height, width, _ = matplotlib.image.imread(path).shape
        widths.append((width, height))
    assert widths[0][0] < widths[1][0] < widths[2][0]
    assert widths[0][1] == widths[1][1] < widths[2][1]
