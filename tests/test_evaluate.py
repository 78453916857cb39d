"""Perplexity: the right tokens are scored, through the cache, and the right bytes counted."""

import io
import math
import sys
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import byte_level, load_quietly, sentencepiece, write_toy

from h1bjax import window_scores
from h1bjax.decoder import Decoder
from h1bjax.evaluate import perplexity
from h1bjax.token_bytes import token_sizes

pytestmark = pytest.mark.once

TEXT = "Once upon a time, the thé ended: 日本 and 😀 the end. " * 2


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A SentencePiece-style tokenizer that adds no BOS."""
    return write_toy(tmp_path_factory.mktemp("plain"), sentencepiece(bos=False))


def windows(ids, context):
    return [ids[begin : begin + context] for begin in range(0, len(ids), context)]


def float64_losses(model, text, context):
    """The definition, one window at a time, without a cache: each token's place and nats."""
    losses = []
    tokenizer = model.tokenizer
    for window in windows(tokenizer.encode_plain(text), context):
        row = [tokenizer.bos_token_id, *window] if tokenizer.adds_bos else window
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(row)] = row
        positions = np.where(np.arange(32) < len(row), np.arange(32), -1)[None]
        logits, _ = model.decoder(jnp.asarray(tokens), jnp.asarray(positions))
        logits = np.asarray(logits[0], np.float64)
        for before, token in enumerate(row[1:]):
            shifted = logits[before] - logits[before].max()
            place = before + (0 if tokenizer.adds_bos else 1)
            losses.append((place, np.log(np.exp(shifted).sum()) - shifted[token]))
    return losses


# The number


@pytest.mark.parametrize("folder", ["toy_folder", "bos_folder"])
def test_it_is_the_definition_in_float64(folder, request):
    model = load_quietly(request.getfixturevalue(folder))
    losses = float64_losses(model, TEXT, context=24)
    total, count = sum(nats for _, nats in losses), len(losses)
    result = perplexity(model, TEXT, context=24)
    assert result.tokens == count
    assert result.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / result.bytes, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("folder", ["toy_folder", "bos_folder"])
def test_late_tokens_are_those_of_the_last_quarter(folder, request):
    model = load_quietly(request.getfixturevalue(folder))
    losses = float64_losses(model, TEXT, context=24)
    late = [nats for place, nats in losses if place >= 18]
    result = perplexity(model, TEXT, context=24).late
    assert result is not None
    assert result.tokens == len(late)
    assert result.nats == pytest.approx(sum(late), rel=1e-5)
    sizes = token_sizes(model.tokenizer, TEXT)[1]
    assert result.bytes == sum(size for index, size in enumerate(sizes) if index % 24 >= 18)
    assert result.bits_per_byte == pytest.approx(sum(late) / math.log(2) / result.bytes, rel=1e-5)


def test_nothing_is_late_where_no_window_is_three_quarters_full(toy_folder):
    model = load_quietly(toy_folder)
    count = len(model.tokenizer.encode_plain(TEXT))
    assert perplexity(model, TEXT, context=2 * count).late is None


def test_documents_are_scored_apart(bos_folder):
    model = load_quietly(bos_folder)
    documents = [TEXT[:30], "the end", TEXT[30:]]
    alone = [perplexity(model, document, context=24) for document in documents]
    result = perplexity(model, documents, context=24)
    assert result.tokens == sum(one.tokens for one in alone)
    assert result.bytes == sum(one.bytes for one in alone) == len((TEXT + "the end").encode())
    assert result.total.nats == pytest.approx(sum(one.total.nats for one in alone), rel=1e-5)


def test_the_first_windows_alone_can_be_scored(bos_folder):
    model = load_quietly(bos_folder)
    text = model.tokenizer.decode(model.tokenizer.encode_plain(TEXT)[:48])
    result = perplexity(model, TEXT, context=24, tokens=60)
    assert result.tokens == 48
    assert result.total.nats == pytest.approx(perplexity(model, text, context=24).total.nats)


def test_it_is_the_loss_of_transformers(bos_folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = load_quietly(bos_folder)
    ids = torch.tensor([model.tokenizer.encode(TEXT)])
    reference = transformers.AutoModelForCausalLM.from_pretrained(bos_folder, dtype=torch.float32)
    with torch.no_grad():
        loss = reference(input_ids=ids, labels=ids).loss.item()
    result = perplexity(model, TEXT, context=ids.shape[1])
    assert result.tokens == ids.shape[1] - 1
    assert result.nats_per_token == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("cache", [pytest.param("exact", marks=pytest.mark.slow), "h1b"])
def test_chunks_and_batches_change_nothing(bos_folder, cache, monkeypatch):
    model = load_quietly(bos_folder, cache)
    expected = perplexity(model, TEXT, context=40, batch=8)
    monkeypatch.setattr(window_scores, "SCORE_CHUNK", 16)
    monkeypatch.setattr(window_scores, "LOGITS_BYTES", 4 * 300 * 8)
    # Rounds of two windows and of one, in the buffers of the first.
    assert len(windows(model.tokenizer.encode_plain(TEXT), 40)) == 3
    result = perplexity(model, TEXT, context=40, batch=2)
    assert result.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)


def test_a_compressed_window_is_scored_as_decoding_sees_it(bos_folder):
    model = load_quietly(bos_folder, "h1b")
    ids = model.tokenizer.encode(TEXT)
    cache = model.decoder.init_cache(batch=1, max_length=len(ids))
    step = jax.jit(lambda decoder, token, position, cache: decoder(token, position, cache))
    nats = 0.0
    for position, (token, following) in enumerate(pairwise(ids)):
        logits, cache = step(model.decoder, jnp.array([[token]]), jnp.array([[position]]), cache)
        nats -= float(jax.nn.log_softmax(logits[0, 0])[following])
    result = perplexity(model, TEXT, context=len(ids))
    exact = perplexity(load_quietly(bos_folder), TEXT, context=len(ids))
    assert result.nats_per_token == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert result.nats_per_token != pytest.approx(exact.nats_per_token, rel=1e-3)


def test_the_cache_never_holds_more_than_the_context(bos_folder):
    model = load_quietly(bos_folder)
    text = TEXT * 2
    assert len(model.tokenizer.encode_plain(text)) > 128
    result = perplexity(model, text, context=128)
    assert result.cache.capacity == 128


def test_a_real_model_predicts_its_own_kind_of_story(stories, shared_data):
    text = (shared_data / "tinystories" / "tinystories_val.txt").read_text(encoding="utf-8")[:4000]
    result = perplexity(load_quietly(stories), text, context=256)
    assert result.bytes == len(text.encode())
    assert 0.9 < result.bits_per_byte < 1.2


# Tokens and bytes


def test_with_a_bos_everything_is_scored(bos_folder):
    model = load_quietly(bos_folder)
    result = perplexity(model, TEXT, context=24)
    assert result.tokens == len(model.tokenizer.encode_plain(TEXT))
    assert result.bytes == len(TEXT.encode())


@pytest.mark.parametrize(
    ("text", "unscored"),
    [
        # "the" is one token of three bytes, "é" two of one byte, "😀" four.
        ("the" * 6, ["the", "the"]),
        ("ééé", ["\xc3", "\xc3"]),
        ("ab😀cd", ["a", "\x98"]),
        ("the</s>é😀the", ["the", "?", "?"]),
        ("ab</s>cd</s>ef", ["a", "c", "f"]),
        ("abcd</s>ef", ["a", "</s>"]),
    ],
)
def test_byte_level_windows_leave_out_the_bytes_of_their_first_token(toy_folder, text, unscored):
    model = load_quietly(toy_folder)
    context = 4 if len(unscored) == 2 else 3
    ids = model.tokenizer.encode_plain(text)
    assert len(windows(ids, context)) == len(unscored)
    result = perplexity(model, text, context=context)
    assert result.tokens == len(ids) - len(unscored)
    assert result.bytes == len(text.encode()) - sum(len(token) for token in unscored)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("the end", "the"),
        ("a thé", "a"),
        (" a", ""),
        ("x the", ""),
        ("日本", ""),
        ("</s>the", "</s>"),
    ],
)
def test_the_space_that_sentencepiece_adds_is_no_byte_of_the_text(plain_folder, text, first):
    model = load_quietly(plain_folder)
    ids = model.tokenizer.encode_plain(text)
    result = perplexity(model, text, context=32)
    assert result.tokens == len(ids) - 1
    assert result.bytes == len(text.encode()) - len(first.encode())


# Mistakes


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {"context": 8}, "0 tokens, none of which"),
        ("a", {"context": 8}, "1 tokens, none of which"),
        ("the end", {"context": 1}, "context=1 must be at least 2"),
        ("the end", {"context": 8, "batch": 0}, "batch=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(toy_folder, text, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(load_quietly(toy_folder), text, **options)


def test_a_text_needs_a_tokenizer(untokenized_folder):
    with pytest.raises(ValueError, match="no tokenizer"):
        perplexity(load_quietly(untokenized_folder), "the end", context=8)


def test_a_sliding_window_is_respected(tmp_path):
    write_toy(tmp_path, byte_level(), model_type="mistral", sliding_window=64)
    with pytest.raises(ValueError, match="context=65 exceeds the model's sliding window of 64"):
        perplexity(load_quietly(tmp_path), "the end", context=65)


def test_ids_beyond_the_models_vocabulary_are_named(tmp_path):
    write_toy(tmp_path, byte_level(), vocab_size=258)
    with pytest.raises(ValueError, match=r"outside the model's vocabulary of 258: \[260\]"):
        perplexity(load_quietly(tmp_path), "the end", context=8)


def test_windows_beyond_the_trained_length_warn(toy_folder):
    model = load_quietly(toy_folder)
    config = replace(model.config, max_position_embeddings=8)
    short = replace(model, decoder=Decoder(config, model.decoder.parameters()))
    with pytest.warns(UserWarning, match="windows of 9 tokens with a model made for 8"):
        perplexity(short, "0123456789", context=20)


def test_weights_that_are_not_finite_raise(toy_folder):
    model = load_quietly(toy_folder)
    parameters = model.decoder.parameters()
    parameters["final_norm"] = parameters["final_norm"].at[3].set(np.nan)
    broken = replace(model, decoder=Decoder(model.config, parameters))
    with pytest.raises(FloatingPointError, match="window 0 are not finite"):
        perplexity(broken, "ab😀cd", context=4)


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_shown_on_a_terminal_only(toy_folder, monkeypatch, stream):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    perplexity(load_quietly(toy_folder), "ab😀cd", context=4)
    assert ("Scoring" in stderr.getvalue()) == stderr.isatty()
