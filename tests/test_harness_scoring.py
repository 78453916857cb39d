"""Scoring and generating for tasks, without the harness: right tokens, any batch, any order."""

import functools

import jax
import numpy as np
import pytest
from toy import EOS, load_quietly

from h1bjax.generate import bucket_size
from h1bjax.harness import scoring
from h1bjax.harness.generation import GenerationRequest, generate_texts
from h1bjax.harness.scoring import Continuation, score_continuations
from h1bjax.window_scores import WindowScores

pytestmark = pytest.mark.once

LENGTH = 128


def random_requests(count, seed=0, longest=56):
    """All of one bucket of lengths, from 33 to 64 tokens, unless `longest` is less."""
    generator = np.random.default_rng(seed)

    def tokens(length):
        return tuple(generator.integers(3, 200, length).tolist())

    return [
        Continuation(
            tokens(generator.integers(min(36, longest - 1), longest)),
            tokens(generator.integers(2, 9)),
        )
        for _ in range(count)
    ]


@functools.cache
def logits_of(decoder):
    """All logits of a batch of padded rows, without a cache."""
    return jax.jit(lambda tokens, positions: decoder(tokens, positions)[0])


def float64_scores(model, requests):
    """The definition."""
    rows = np.zeros((len(requests), 64), np.int32)
    positions = np.full(rows.shape, -1, np.int32)
    for index, request in enumerate(requests):
        row = [*request.context, *request.tokens]
        rows[index, : len(row)] = row
        positions[index, : len(row)] = np.arange(len(row))
    logits = np.asarray(logits_of(model.decoder)(rows, positions), np.float64)
    totals = []
    for request, row in zip(requests, logits, strict=True):
        begin = len(request.context) - 1
        part = row[begin : begin + len(request.tokens)]
        part = part - part.max(axis=1, keepdims=True)
        wanted = part[np.arange(len(part)), list(request.tokens)]
        totals.append((wanted - np.log(np.exp(part).sum(axis=1))).sum())
    return totals


# Scoring


def test_scores_are_the_definition_in_float64_in_the_order_of_the_requests(toy_folder):
    model = load_quietly(toy_folder)
    requests = random_requests(6)
    scores = score_continuations(model.decoder, requests, batch=4, max_length=LENGTH)
    assert [score.log_likelihood for score in scores] == pytest.approx(
        float64_scores(model, requests), rel=1e-5
    )


@pytest.mark.parametrize("cache", ["exact", pytest.param("h1b-signs", marks=pytest.mark.slow)])
def test_what_a_model_would_generate_is_greedy(toy_folder, cache):
    model = load_quietly(toy_folder, cache)
    context = random_requests(1)[0].context
    output = model.generate(list(context), max_new_tokens=6, logprobs=True)
    said = tuple(output.tokens[0])
    other = (*said[:-1], said[-1] + 1)
    greedy, changed = score_continuations(
        model.decoder,
        [Continuation(context, said), Continuation(context, other)],
        batch=4,
        max_length=LENGTH,
    )
    assert greedy.greedy
    assert not changed.greedy
    assert greedy.log_likelihood == pytest.approx(sum(output.logprobs[0]), rel=1e-4)


def test_choices_read_once_score_as_rows_of_their_own(toy_folder, monkeypatch):
    model = load_quietly(toy_folder, "h1b-signs")
    contexts = [request.context for request in random_requests(3)]
    requests = [Continuation(context, (token,)) for token in (5, 77, 123) for context in contexts]
    read: list[list[int]] = []

    def counted(decoder, prompts, cache):
        read.extend(prompt for prompt in prompts if prompt)
        return scoring_prefill(decoder, prompts, cache)

    scoring_prefill = scoring.prefill
    monkeypatch.setattr(scoring, "prefill", counted)
    together = score_continuations(model.decoder, requests, batch=4, max_length=LENGTH)
    assert sorted(map(tuple, read)) == sorted(contexts)
    alone = [
        score_continuations(model.decoder, [request], batch=4, max_length=LENGTH)[0]
        for request in requests
    ]
    assert len(read) == len(contexts)
    assert [one.log_likelihood for one in together] == pytest.approx(
        [one.log_likelihood for one in alone], rel=1e-4
    )


def test_equal_requests_are_read_once(toy_folder, monkeypatch):
    model = load_quietly(toy_folder)
    requests = random_requests(2)
    rows = []

    def counted(decoder, windows, **sizes):
        rows.append(len(windows))
        return scoring_windows(decoder, windows, **sizes)

    scoring_windows = scoring.score_windows
    monkeypatch.setattr(scoring, "score_windows", counted)
    scores = score_continuations(model.decoder, requests * 3, batch=4, max_length=LENGTH)
    assert sum(rows) == 2
    assert scores[:2] == scores[2:4] == scores[4:]


def test_few_shapes_compile(toy_folder, monkeypatch):
    decoder = load_quietly(toy_folder).decoder
    cache = decoder.init_cache(batch=1, max_length=1)
    lengths = []

    def noted(decoder, group, *, batch, length):
        lengths.append((batch, length))
        shape = group.inputs.shape
        return WindowScores(np.zeros(shape), np.zeros(shape, bool), cache)

    monkeypatch.setattr(scoring, "score_windows", noted)
    requests = random_requests(8) + random_requests(4, longest=10)
    score_continuations(decoder, requests, batch=4, max_length=LENGTH)
    sizes = {len(request.context) + len(request.tokens) - 1 for request in requests}
    assert len(sizes) > 5
    # Each shape once, and the longest first.
    assert lengths == [(4, size) for size in sorted({*map(bucket_size, sizes)}, reverse=True)]
    assert len(lengths) == 2


def test_a_long_context_loses_its_beginning():
    request = Continuation(tuple(range(10)), (20, 21))
    # The last token is scored, not read.
    assert request.cut(11) == request
    assert request.cut(10).context == tuple(range(1, 10))
    assert request.cut(2) == Continuation((9,), (20, 21))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Continuation((), (1,)), "at least one token each"),
        (Continuation((1,), ()), "at least one token each"),
        (Continuation((1,), (2, 3, 4)), "a continuation of 3 tokens is longer than the model's 2"),
    ],
)
def test_requests_that_cannot_be_scored_are_named(request_, message):
    with pytest.raises(ValueError, match=message):
        request_.cut(2)


# Generation


def greedy(**changes):
    return GenerationRequest.create({"max_gen_toks": 5, **changes}, max_new_tokens=7)


def test_texts_are_those_of_generate_in_the_order_of_the_prompts(toy_folder):
    model = load_quietly(toy_folder)
    tokenizer = model.tokenizer
    texts = ["the end", "Once upon", "a"]
    requests = [greedy(), greedy(max_gen_toks=3), greedy()]
    prompts = [
        (tokenizer.encode(text), request) for text, request in zip(texts, requests, strict=True)
    ]
    expected = [
        model.generate([text] * 2, max_new_tokens=request.max_new_tokens, stop_ids=[EOS]).text[0]
        for text, request in zip(texts, requests, strict=True)
    ]
    assert generate_texts(model, prompts, batch=2, seed=0) == expected


def test_text_ends_before_a_stop_string(toy_folder):
    model = load_quietly(toy_folder)
    prompt = model.tokenizer.encode("the end")
    (whole,) = generate_texts(model, [(prompt, greedy())], batch=2, seed=0)
    stop = whole[2:4]
    (cut,) = generate_texts(model, [(prompt, greedy(until=[stop, ""]))], batch=2, seed=0)
    assert cut == whole[: whole.index(stop)]


def test_repeated_prompts_are_drawn_differently(toy_folder):
    model = load_quietly(toy_folder)
    prompt = model.tokenizer.encode("the end")
    drawn = greedy(do_sample=True, temperature=2.0, max_gen_toks=8)
    texts = generate_texts(model, [(prompt, drawn)] * 4, batch=2, seed=0)
    assert len(set(texts)) == 4
    assert texts == generate_texts(model, [(prompt, drawn)] * 4, batch=2, seed=0)
    assert texts != generate_texts(model, [(prompt, drawn)] * 4, batch=2, seed=1)


@pytest.mark.parametrize(
    ("arguments", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"do_sample": False, "temperature": 0.5}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.2}, 0.2),
    ],
)
def test_sampling_is_asked_for_as_in_transformers(arguments, temperature):
    assert greedy(**arguments).temperature == temperature


def test_a_length_has_several_names():
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert GenerationRequest.create({name: 3}, max_new_tokens=7).max_new_tokens == 3
    assert GenerationRequest.create({}, max_new_tokens=7).max_new_tokens == 7
    assert GenerationRequest.create({"until": "\n"}, max_new_tokens=7).until == ("\n",)


def test_unknown_generation_arguments_are_named():
    with pytest.raises(ValueError, match="does not have: num_beams, typical_p; it has until"):
        greedy(typical_p=0.5, num_beams=3)
