"""Tokenizers made from text: every text survives them, and others can load them."""

import json

import pytest

import train.tokenizer
from h1bjax.tokenizer import Tokenizer
from train.tokenizer import END, main, save_tokenizer, train_tokenizer

pytestmark = pytest.mark.once

TEXT = "the cat sat on the mat and the dog sat on the log. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tokenizer"
    save_tokenizer(train_tokenizer([TEXT, "another document"], 280), folder)
    return folder


@pytest.mark.parametrize("text", [TEXT, "", "  Ünïcode \n\t\x00 漢字 🙂", "zebra"])
def test_any_text_survives(folder, text):
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_frequent_words_are_single_tokens_and_nothing_is_added(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    assert len(tokenizer.encode(" the the the")) == 3
    assert tokenizer.vocab_size == 280
    assert not tokenizer.adds_bos


def test_the_end_token_is_the_first_and_special(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 0
    assert tokenizer.encode(f"the{END}")[-1] == 0
    assert tokenizer.decode([0]) == ""


def test_transformers_reads_it_alike(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = Tokenizer.from_pretrained(folder)
    for text in (TEXT, " leading", "a  b\n"):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == 0


def test_a_text_that_gives_too_few_tokens_is_refused():
    with pytest.raises(ValueError, match=r"only \d+ tokens, not 5000"):
        train_tokenizer([TEXT], 5000)
    with pytest.raises(ValueError, match="256 is too small; 257 is the least"):
        train_tokenizer([TEXT], 256)


def test_long_documents_are_counted_whole(monkeypatch):
    monkeypatch.setattr(train.tokenizer, "PIECE", 12)
    tokenizer = train_tokenizer(["0123456789ab zebra zebra"], 262)
    assert len(tokenizer.encode(" zebra").ids) == 1


def test_the_command_writes_a_folder_and_overwrites_none(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    command = ["--text", str(tmp_path / "text.txt"), "--vocab-size", "270", "--out", str(out)]
    assert main(command) == 0
    assert Tokenizer.from_pretrained(out).vocab_size == 270
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == END
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_command_names_a_missing_file(tmp_path, capsys):
    command = ["--text", str(tmp_path / "absent.txt"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "absent.txt" in capsys.readouterr().err
