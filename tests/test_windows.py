"""Windows: which tokens are read and scored, and how many bytes of the text each stands for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from toy import byte_level, sentencepiece

from h1bjax.token_bytes import token_sizes
from h1bjax.tokenizer import Tokenizer
from h1bjax.windows import text_windows

pytestmark = pytest.mark.once


VOCABULARY = 300
TEXT = "Once upon a time, the thé ended: 日本 and 😀 the end. "


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "bos", "normalised"])
def tokenizer(request, tmp_path_factory):
    made = {
        "byte level": byte_level,
        "sentencepiece": lambda: sentencepiece(bos=False),
        "bos": sentencepiece,
        "normalised": normalised,
    }[request.param]()
    return save(tmp_path_factory.mktemp("tokenizer"), made)


def normalised():
    """One that composes accents, so that its tokens have fewer bytes than the text."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def save(folder, tokenizer):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return Tokenizer.from_pretrained(folder)


def targets(windows):
    return [
        row[:length].tolist() for row, length in zip(windows.targets, windows.lengths, strict=True)
    ]


# Bytes


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["the", " ", "thé", "</s>", "<unk>", "😀", "e\u0301", "\n", "x"]))
    | st.text(max_size=20).map(lambda text: [text])
)
def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizer, parts):
    text = "".join(parts)
    ids, sizes = token_sizes(tokenizer, text)
    assert ids.tolist() == tokenizer.encode_plain(text)
    assert np.all(sizes >= 0)
    assert sizes.sum() == len(text.encode())


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        # "the" is one token, and "é" two of one byte each; "</s>" and "<unk>" are special.
        (byte_level, "thea é", [3, 1, 1, 1, 1]),
        (byte_level, "the</s>é<unk>", [3, 4, 1, 1, 5]),
        (byte_level, " the", [1, 3]),
        # "▁the" is one token here. The space in front, at the beginning and after a special
        # token, is none of the text's.
        (sentencepiece, "the the é", [3, 4, 1, 1, 1]),
        (sentencepiece, " the", [0, 4]),
        (sentencepiece, "the</s>the", [3, 4, 3]),
        # Composing took one of six bytes away, which counts where rounding puts it.
        (normalised, "thee\u0301", [4, 1, 1]),
    ],
)
def test_each_token_has_its_own_bytes(tmp_path, make, text, expected):
    assert token_sizes(save(tmp_path, make()), text)[1].tolist() == expected


# Windows


def test_without_a_bos_the_first_token_of_a_window_is_only_read(tmp_path):
    tokenizer = save(tmp_path, byte_level())
    windows = text_windows(tokenizer, VOCABULARY, "abcdefg", context=3)
    a, b, c, d, e, f = tokenizer.encode_plain("abcdef")
    # The last window has one token, and so nothing to predict.
    assert windows.inputs.tolist() == [[a, b], [d, e]]
    assert windows.targets.tolist() == [[b, c], [e, f]]
    assert windows.target_bytes.tolist() == [[1, 1], [1, 1]]
    assert windows.lengths.tolist() == [2, 2]
    assert not windows.bos


def test_with_a_bos_every_token_is_predicted(tmp_path):
    tokenizer = save(tmp_path, sentencepiece())
    bos, a, b, c, d = tokenizer.encode("abcd")
    windows = text_windows(tokenizer, VOCABULARY, "abcd", context=3)
    assert windows.inputs.tolist() == [[bos, a, b], [bos, 0, 0]]
    assert windows.targets.tolist() == [[a, b, c], [d, 0, 0]]
    assert windows.target_bytes.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert windows.lengths.tolist() == [3, 1]
    assert windows.bos


def test_no_window_spans_two_documents(tokenizer):
    documents = [TEXT, "the end", TEXT[:7]]
    windows = text_windows(tokenizer, VOCABULARY, documents, context=16)
    apart = [text_windows(tokenizer, VOCABULARY, text, context=16) for text in documents]
    assert len(windows) == sum(map(len, apart))
    rows = [row for window in apart for row in targets(window)]
    assert targets(windows) == rows


def test_late_targets_have_three_quarters_of_a_full_context_before_them(tokenizer):
    windows = text_windows(tokenizer, VOCABULARY, [TEXT, "the end" * 2], context=16)
    first = 0 if tokenizer.adds_bos else 1
    for row, length in enumerate(windows.lengths):
        places = [first + index for index in range(windows.longest) if windows.late[row, index]]
        assert places == list(range(12, first + length))
    assert windows.late.any()


def test_only_whole_windows_among_the_first_tokens_are_taken(tokenizer):
    length, context = len(tokenizer.encode_plain(TEXT)), 11
    everything = text_windows(tokenizer, VOCABULARY, [TEXT, TEXT], context=context)
    assert length % context > 1
    for tokens, count in [
        (context, 1),
        (3 * context - 1, 2),
        (length - 1, length // context),
        (length, length // context + 1),
        (length + context, length // context + 2),
        (2 * length + 99, len(everything)),
    ]:
        some = text_windows(tokenizer, VOCABULARY, [TEXT, TEXT], context=context, tokens=tokens)
        assert targets(some) == targets(everything)[:count]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context=1 must be at least 2"),
        ({"context": 8, "tokens": 0}, "tokens=0 must be at least 1"),
        ({"context": 8, "tokens": 7}, "none of which can be scored in whole windows of 8"),
    ],
)
def test_bad_arguments_are_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        text_windows(tokenizer, VOCABULARY, TEXT, **options)
