"""Generation: what each row becomes, whatever its neighbours, chunks, stops and earlier turns."""

import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrations import TEXT, random_calibration
from toy import load_quietly

import h1bjax
from h1bjax import generate as generation
from h1bjax.calibration_file import is_calibratable, save_calibration
from h1bjax.generate import DecodeState, decode, decode_step, prefill
from h1bjax.output import RowText
from h1bjax.request import GenerateOptions, prepare_cache, prepare_control

# Of different lengths, and everywhere the same batch, buckets and capacity: one compilation each.
PROMPTS = ["Once upon a time", "the then", "é, the end."]
NEW = 16


@pytest.fixture(scope="module")
def exact(toy_folder):
    return load_quietly(toy_folder)


@pytest.fixture(scope="module")
def greedy(exact):
    """What the exact cache continues `PROMPTS` with."""
    return exact.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)


def plain(model, prompts):
    return [model.tokenizer.encode(prompt) for prompt in prompts]


def log_probabilities(model, rows):
    """Float64, of what follows each token of ragged rows, computed without a cache."""
    tokens = np.zeros((len(rows), 64), np.int32)
    positions = np.full_like(tokens, -1)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        positions[index, : len(row)] = np.arange(len(row))
    logits, _ = model.decoder(jnp.asarray(tokens), jnp.asarray(positions))
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def decoded(model, prompt, tokens):
    """The text of tokens after a prompt that ends in text."""
    return model.tokenizer.decode(prompt + tokens)[len(model.tokenizer.decode(prompt)) :]


# Greedy tokens


def test_the_toy_model_is_not_trivial(greedy):
    for row in greedy.tokens:
        assert len(row) == NEW
        assert len(set(row)) > NEW // 2
    assert greedy.finish_reasons == ["length"] * len(PROMPTS)


def test_greedy_tokens_are_those_of_transformers(exact, toy_folder, greedy):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(toy_folder, dtype=torch.float32)
    for prompt, ours in zip(plain(exact, PROMPTS), greedy.tokens, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert ours == theirs[0, len(prompt) :].tolist()


def test_a_real_model_tells_the_known_story(stories):
    out = load_quietly(stories).generate("Once upon a time", max_new_tokens=64)
    assert out.text == [
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she "
        "saw a big, red ball. She wanted to play with it, but it was too high.\nLily's mom said"
    ]
    assert len(out.tokens[0]) == 64


def test_a_real_model_tells_the_same_story_as_transformers(stories):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = load_quietly(stories)
    prompt = model.tokenizer.encode("Once upon a time")
    reference = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    theirs = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )
    ours = model.generate("Once upon a time", max_new_tokens=64)
    assert ours.tokens == [theirs[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0, "top_k": 50, "min_p": 0.01}])
def test_log_probabilities_are_the_models_own(exact, options):
    out = exact.generate(PROMPTS, max_new_tokens=NEW, logprobs=True, **options)
    prompts = plain(exact, PROMPTS)
    rows = [prompt + new for prompt, new in zip(prompts, out.tokens, strict=True)]
    expected = log_probabilities(exact, rows)
    for row, (prompt, new) in enumerate(zip(prompts, out.tokens, strict=True)):
        before = len(prompt) - 1 + np.arange(len(new))
        np.testing.assert_allclose(out.logprobs[row], expected[row, before, new], atol=1e-4)


def test_log_probabilities_come_only_on_request(exact):
    assert exact.generate(PROMPTS, max_new_tokens=NEW).logprobs is None


# Rows and chunks


@pytest.fixture(scope="module")
def calibrated_folder(toy_folder, tmp_path_factory):
    """The toy model with a calibration of every preset, since some need one."""
    folder = shutil.copytree(toy_folder, tmp_path_factory.mktemp("calibrated") / "toy")
    for spec in h1bjax.PRESETS.values():
        if is_calibratable(spec):
            save_calibration(folder, random_calibration(spec), TEXT)
    return folder


# The others share their code, each with some of the tests of caches.
COMMON = {"h1b", "exact"}


@pytest.mark.once
@pytest.mark.parametrize(
    "cache",
    [pytest.param(x, marks=() if x in COMMON else pytest.mark.slow) for x in h1bjax.PRESETS],
)
def test_a_row_does_not_depend_on_its_neighbours(calibrated_folder, cache):
    model = load_quietly(calibrated_folder, cache)
    together = model.generate(PROMPTS, max_new_tokens=NEW).tokens
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert model.generate([prompt] * len(PROMPTS), max_new_tokens=NEW).tokens[0] == row
    assert len({*map(tuple, together)}) == len(PROMPTS)


@pytest.mark.parametrize("cache", ["exact", pytest.param("h1b", marks=pytest.mark.slow)])
def test_a_row_alone_is_the_row_of_a_batch(toy_folder, cache):
    model = load_quietly(toy_folder, cache)
    together = model.generate(PROMPTS, max_new_tokens=NEW).tokens
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert model.generate(prompt, max_new_tokens=NEW).tokens == [row]


@pytest.mark.once
@pytest.mark.parametrize("cache", ["exact", "h1b"])
def test_prompts_read_in_chunks_continue_as_if_read_at_once(toy_folder, cache, monkeypatch):
    model = load_quietly(toy_folder, cache)
    prompts = ["the end " * 8, "once", "a long story, " * 3]
    at_once = model.generate(prompts, max_new_tokens=NEW).tokens
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 16)
    assert max(map(len, plain(model, prompts))) > 2 * 16
    assert model.generate(prompts, max_new_tokens=NEW).tokens == at_once


@pytest.mark.once
def test_exact_prefill_reads_the_prompt_as_an_exact_cache_does(toy_folder, exact):
    prompts = ["the end " * 8, "once", "a long story, " * 3]
    model = load_quietly(toy_folder, "h1b")
    expected = exact.generate(prompts, max_new_tokens=1, logprobs=True)
    exactly = model.generate(prompts, max_new_tokens=1, logprobs=True, exact_prefill=True)
    compressed = model.generate(prompts, max_new_tokens=1, logprobs=True)
    assert exactly.tokens == expected.tokens
    np.testing.assert_allclose(exactly.logprobs, expected.logprobs, atol=1e-4)
    assert np.abs(np.subtract(compressed.logprobs[0], expected.logprobs[0])) > 1e-3


# Stops


def cut(tokens, stop_ids):
    """What is left of a row that ends at the first of these ids, and why it ends."""
    ends = [index for index, token in enumerate(tokens) if token in stop_ids]
    return (tokens[: ends[0]], "stop") if ends else (tokens, "length")


@pytest.fixture(scope="module")
def stop_ids(greedy):
    """Two ids that end the first and the last row early, but not the one between."""
    first, between, last = greedy.tokens
    return [
        next(token for token in row[at:] if token not in between)
        for row, at in [(first, 4), (last, 2)]
    ]


def test_stop_ids_end_their_own_rows(exact, greedy, stop_ids):
    expected = [cut(row, stop_ids) for row in greedy.tokens]
    assert [reason for _, reason in expected] == ["stop", "length", "stop"]
    out = exact.generate(PROMPTS, max_new_tokens=NEW, stop_ids=stop_ids, logprobs=True)
    assert out.tokens == [row for row, _ in expected]
    assert out.finish_reasons == [reason for _, reason in expected]
    assert [len(row) for row in out.logprobs] == [len(row) for row in out.tokens]


@pytest.fixture(scope="module")
def early(toy_folder, tmp_path_factory, stop_ids):
    """The same model, whose generation_config.json names tokens that it soon writes as its eos."""
    folder = tmp_path_factory.mktemp("early")
    load_quietly(toy_folder).save_pretrained(folder, source=toy_folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {stop_ids}}}')
    return load_quietly(folder)


def test_every_eos_of_the_generation_config_ends_a_row(early, greedy, stop_ids):
    out = early.generate(PROMPTS, max_new_tokens=NEW)
    expected = [cut(row, stop_ids) for row in greedy.tokens]
    assert out.tokens == [row for row, _ in expected]
    assert out.finish_reasons == [reason for _, reason in expected]
    # A stop id stays in the cache; it is no part of the tokens.
    prompts = plain(early, PROMPTS)
    assert out.cache.lengths.tolist() == [
        len(prompt) + len(row) + (reason == "stop")
        for prompt, (row, reason) in zip(prompts, expected, strict=True)
    ]


def first_containing(model, prompt, tokens, stops):
    """The shortest beginning of a row whose text contains a stop string, or the whole row."""
    for count in range(1, len(tokens) + 1):
        text = decoded(model, prompt, tokens[:count])
        if any(stop in text for stop in stops):
            return tokens[:count]
    return tokens


def test_stop_strings_end_their_own_rows_across_tokens(exact, greedy):
    stops = [greedy.text[0][4:7], greedy.text[1][10:12]]
    out = exact.generate(PROMPTS, max_new_tokens=NEW, stop=stops)
    assert out.tokens == [
        first_containing(exact, prompt, row, stops)
        for prompt, row in zip(plain(exact, PROMPTS), greedy.tokens, strict=True)
    ]
    for text, whole, reason in zip(out.text, greedy.text, out.finish_reasons, strict=True):
        begins = [whole.index(stop) for stop in stops if stop in whole]
        assert text == whole[: min(begins, default=len(whole))]
        assert reason == ("stop" if begins else "length")
    assert len(out.tokens[0]) <= 7
    assert len(out.tokens[1]) <= 12


def test_a_stop_string_in_the_prompt_ends_nothing(exact, greedy):
    assert exact.generate(PROMPTS, max_new_tokens=NEW, stop=["upon"]).tokens == greedy.tokens


def test_the_text_is_what_the_tokens_decode_to(exact, greedy):
    for prompt, new, text in zip(plain(exact, PROMPTS), greedy.tokens, greedy.text, strict=True):
        assert text == decoded(exact, prompt, new)


@pytest.mark.parametrize(
    ("prompt", "tokens", "text"),
    [
        ("the end", [" the", "a"], " thea"),
        ("", [" the", " a"], "the a"),
        ("日", [" the"], " the"),
        ("the.", ["<0xFF>", "a"], "\ufffda"),
        ("日", ["<0xE6>", "<0x97>", "<0xA5>"], "日"),
    ],
    ids=["after text", "after a BOS alone", "after bytes", "invalid bytes", "whole characters"],
)
def test_the_text_is_of_the_new_tokens_alone(bos_folder, prompt, tokens, text):
    tokenizer = load_quietly(bos_folder).tokenizer
    ids = [tokenizer.backend.token_to_id(token.replace(" ", "▁")) for token in tokens]
    assert RowText.after(tokenizer, tokenizer.encode(prompt), ()).decode(ids) == text


# Turns


def test_a_second_turn_continues_the_first(early, greedy, stop_ids):
    first = early.generate(PROMPTS, max_new_tokens=NEW, max_length=100)
    assert first.finish_reasons == ["stop", "length", "stop"]
    follow = [[40, 41, 42], [7], [50, 60]]
    # The eos that ended a row is part of its history.
    history = [
        prompt + whole[: len(row) + 1] + more
        for prompt, whole, row, more in zip(
            plain(early, PROMPTS), greedy.tokens, first.tokens, follow, strict=True
        )
    ]
    second = early.generate(follow, max_new_tokens=NEW, cache=first.cache)
    at_once = early.generate(history, max_new_tokens=NEW)
    assert second.tokens == at_once.tokens
    assert second.cache.lengths.tolist() == at_once.cache.lengths.tolist()


@pytest.mark.once
def test_a_cache_grows_for_a_turn_that_needs_more(exact, greedy):
    first = exact.generate(PROMPTS, max_new_tokens=NEW)
    assert first.cache.capacity == 128
    follow = [[40 + index % 50 for index in range(90)], [7], [50, 60]]
    second = exact.generate(follow, max_new_tokens=NEW, cache=first.cache)
    assert second.cache.capacity == 256
    history = [
        prompt + new + more
        for prompt, new, more in zip(plain(exact, PROMPTS), greedy.tokens, follow, strict=True)
    ]
    assert second.tokens == exact.generate(history, max_new_tokens=NEW).tokens


def test_a_cache_is_continued_only_once(exact):
    first = exact.generate(PROMPTS, max_new_tokens=NEW)
    exact.generate([[5], [6], [7]], max_new_tokens=NEW, cache=first.cache)
    with pytest.raises(ValueError, match="already continued"):
        exact.generate([[5], [6], [7]], max_new_tokens=NEW, cache=first.cache)


def test_max_length_reserves_room(exact):
    assert exact.generate(PROMPTS, max_new_tokens=NEW, max_length=200).cache.capacity == 256


# Sampling


SAMPLED = {"max_new_tokens": NEW, "temperature": 3.0, "top_p": 0.95}


def test_a_seed_is_its_key_and_decides_everything(exact, greedy):
    first = exact.generate(PROMPTS, seed=3, **SAMPLED).tokens
    assert exact.generate(PROMPTS, seed=3, **SAMPLED).tokens == first
    assert exact.generate(PROMPTS, seed=jax.random.key(3), **SAMPLED).tokens == first
    assert exact.generate(PROMPTS, seed=4, **SAMPLED).tokens != first
    assert first != greedy.tokens


def test_a_sampled_row_does_not_depend_on_its_neighbours(exact):
    row = exact.generate(PROMPTS, seed=3, **SAMPLED).tokens[0]
    assert exact.generate([PROMPTS[0], "x", "yy"], seed=3, **SAMPLED).tokens[0] == row
    assert exact.generate(PROMPTS[0], seed=3, **SAMPLED).tokens == [row]


def test_equal_prompts_are_sampled_apart(exact):
    rows = exact.generate(["the"] * 3, **SAMPLED).tokens
    assert len({*map(tuple, rows)}) == 3


def test_top_k_of_one_is_greedy(exact, greedy):
    out = exact.generate(PROMPTS, max_new_tokens=NEW, temperature=2.0, top_k=1)
    assert out.tokens == greedy.tokens


# Streams


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLED | {"seed": 5, "top_k": 40},
        {"stop_ids": [30, 60, 90, 55]},
        {"stop": ["e", "(", ")", "no such text"]},
        {"max_new_tokens": 7},
    ],
    ids=["greedy", "sampled", "stop ids", "stop strings", "few"],
)
@pytest.mark.parametrize("folder", ["toy_folder", "bos_folder"])
def test_a_stream_concatenates_to_what_generate_returns(folder, options, request):
    model = load_quietly(request.getfixturevalue(folder))
    options = {"max_new_tokens": NEW, **options}
    out = model.generate(PROMPTS, **options)
    steps = list(model.stream(PROMPTS, **options))
    for row in range(len(PROMPTS)):
        tokens = [step.tokens[row] for step in steps]
        assert [token for token in tokens if token is not None] == out.tokens[row]
        assert "".join(step.text[row] for step in steps) == out.text[row]
        finished = [step.finished[row] for step in steps]
        assert finished == sorted(finished)
        assert finished[-1]
    assert steps[-1].cache.lengths.tolist() == out.cache.lengths.tolist()


def test_stop_strings_are_never_streamed(exact, greedy):
    stop = greedy.text[0][4:7]
    pieces = [step.text[0] for step in exact.stream(PROMPTS, max_new_tokens=NEW, stop=[stop])]
    assert "".join(pieces) == greedy.text[0][:4]


def test_the_last_step_of_a_stream_can_be_continued(exact):
    *_, last = exact.stream(PROMPTS, max_new_tokens=NEW)
    out = exact.generate(PROMPTS, max_new_tokens=NEW)
    follow = [[5], [6], [7]]
    assert (
        exact.generate(follow, max_new_tokens=NEW, cache=last.cache).tokens
        == exact.generate(follow, max_new_tokens=NEW, cache=out.cache).tokens
    )


# Compilation and memory


@pytest.mark.once
def test_only_shapes_compile(exact):
    exact.generate(PROMPTS, max_new_tokens=NEW)
    functions: list[Any] = [decode.compiled, generation._prefill_chunk, generation._logits]
    before = [function._cache_size() for function in functions]
    changes: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 9},
        {"temperature": 1.0, "seed": jax.random.key(1)},
        {"stop_ids": [1, 4, 5]},
        {"max_new_tokens": NEW - 5},
        {"max_length": 128},
    ]
    for options in changes:
        exact.generate(PROMPTS, **{"max_new_tokens": NEW, **options})
    exact.generate(["b", "cc", "ddd"], max_new_tokens=NEW)
    assert [function._cache_size() for function in functions] == before
    # The counters do count.
    exact.generate([*PROMPTS, "x"], max_new_tokens=NEW)
    assert [function._cache_size() for function in functions] == [count + 1 for count in before]


@pytest.mark.parametrize(
    ("cache", "dtype", "step"),
    [
        ("exact", "bfloat16", decode_step),
        pytest.param("exact", "float32", decode, marks=pytest.mark.slow),
        ("h1b", "float32", decode),
        pytest.param("kivi-2", "float32", decode, marks=pytest.mark.slow),
        pytest.param("sinks-window", "float32", decode, marks=pytest.mark.slow),
    ],
)
def test_decoding_updates_the_cache_in_place(toy_folder, cache, dtype, step):
    model = load_quietly(toy_folder, cache, dtype=dtype)
    options = GenerateOptions(max_new_tokens=NEW, max_length=1000)
    prompts = plain(model, PROMPTS)
    control = prepare_control(model.decoder, model.tokenizer, options)
    logits, kv_cache = prefill(
        model.decoder, prompts, prepare_cache(model.decoder, prompts, options)
    )
    state = DecodeState.start(kv_cache, logits, control.stop_strings, NEW)
    compiled = step.lower(model.decoder, state, control).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= kv_cache.nbytes

    names = {"float32": "f32", "int32": "s32", "uint16": "u16"}
    shapes = {
        f"{names[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]"
        for leaf in jax.tree.leaves(kv_cache)
        if leaf.ndim == 4
    }
    assert shapes
    text = compiled.as_text()
    assert all(shape in text for shape in shapes)
    copied = re.findall(r"= (\w+\[[\d,]+\])\S* copy\(", text)
    assert shapes.isdisjoint(copied)


def test_a_generation_reports_its_speed(greedy):
    assert greedy.decode_seconds > 0
    assert greedy.tokens_per_second == pytest.approx(3 * NEW / greedy.decode_seconds)
