"""Text becomes one stream of tokens, of which every step reads certain windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1bjax.tokenizer import Tokenizer
from train.data import PackedText, pack


def numbered(windows, context, rest=0):
    """A stream in which every token says where it is."""
    return PackedText(np.arange(windows * context + 1 + rest, dtype=np.uint32), context)


def test_every_document_ends_with_the_end_token(toy_folder):
    tokenizer = Tokenizer.from_pretrained(toy_folder)
    stream = pack(["the cat", "a"], tokenizer, vocab_size=300, end=2)
    assert stream.tolist() == [
        *tokenizer.encode_plain("the cat"),
        2,
        *tokenizer.encode_plain("a"),
        2,
    ]
    assert stream.dtype == np.uint16


def test_every_document_begins_with_the_bos_that_the_tokenizer_adds(bos_folder):
    tokenizer = Tokenizer.from_pretrained(bos_folder)
    stream = pack(["a", "the"], tokenizer, vocab_size=300, end=2)
    assert stream.tolist() == [*tokenizer.encode("a"), 2, *tokenizer.encode("the"), 2]


def test_many_documents_keep_their_order(toy_folder):
    tokenizer = Tokenizer.from_pretrained(toy_folder)
    documents = [str(number) for number in range(100)]
    stream = pack(documents, tokenizer, vocab_size=300, end=2)
    ends = np.flatnonzero(stream == 2)
    texts = [tokenizer.decode(part.tolist()) for part in np.split(stream, ends)]
    assert texts[:-1] == documents


def test_a_large_vocabulary_takes_wider_tokens(toy_folder):
    tokenizer = Tokenizer.from_pretrained(toy_folder)
    assert pack(["a"], tokenizer, vocab_size=1 << 16, end=2).dtype == np.uint16
    assert pack(["a"], tokenizer, vocab_size=100_000, end=99_999).tolist()[-1] == 99_999


def test_tokens_outside_of_the_vocabulary_are_refused(toy_folder):
    tokenizer = Tokenizer.from_pretrained(toy_folder)
    with pytest.raises(ValueError, match=r"outside the model's vocabulary of 20: \["):
        pack(["zebra"], tokenizer, vocab_size=20, end=2)
    with pytest.raises(ValueError, match=r"vocabulary of 300: \[300\]"):
        pack(["zebra"], tokenizer, vocab_size=300, end=300)


@given(st.integers(1, 20), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=50)
def test_every_token_but_the_first_is_the_target_of_one_window(windows, context, data):
    rest = data.draw(st.integers(0, context - 1))
    text = numbered(windows, context, rest)
    assert text.count == windows
    targets = np.concatenate([text.window(index)[1:] for index in range(windows)])
    np.testing.assert_array_equal(targets, np.arange(1, windows * context + 1))


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**40))
@settings(deadline=None, max_examples=50)
def test_an_epoch_reads_every_window_once(windows, size, epoch, seed):
    text = numbered(windows, 5)
    begin, end = epoch * windows, (epoch + 1) * windows
    steps = range(begin // size, -(-end // size))
    read = np.concatenate([text.batch(seed, step, size)[:, 0] // 5 for step in steps])
    offset = begin - steps.start * size
    assert sorted(read[offset : offset + windows]) == list(range(windows))


def test_a_batch_is_a_function_of_seed_and_step():
    text = numbered(50, 4)
    ahead = [text.batch(7, step, 3) for step in range(40)]
    behind = [text.batch(7, step, 3) for step in reversed(range(40))]
    np.testing.assert_array_equal(ahead, behind[::-1])
    assert ahead[0].dtype == np.int32
    assert ahead[0].shape == (3, 5)


def test_the_order_differs_between_epochs_and_seeds():
    text = numbered(50, 4)
    first = text.batch(0, 0, 50)
    assert not np.array_equal(first, text.batch(0, 1, 50))
    assert not np.array_equal(first, text.batch(1, 0, 50))


def test_a_text_shorter_than_one_window_is_refused():
    with pytest.raises(ValueError, match="4 tokens, fewer than the 5 of one window"):
        PackedText(np.arange(4, dtype=np.uint16), 4)
    with pytest.raises(ValueError, match="context=0 must be at least 1"):
        PackedText(np.arange(4, dtype=np.uint16), 0)
