"""The recipe of the model that ships inside."""

import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from h1bjax.calibration_file import calibrated_names
from h1bjax.text_files import read_documents

pytestmark = pytest.mark.once

RECIPES = Path(__file__).parents[1] / "recipes"

BOOKS = [
    {"text": "# I\r\n\r\n---\r\n\r\n“It’s late,”\r\nsaid he—and left.\r\n"},
    {"text": "## I\n\nSecond book.\n\n* * *\n\nIts end.\n"},
]
PLAIN = ['"It\'s late," said he--and left.', "Second book.\n\nIts end."]


@pytest.fixture
def plain_books(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import plain_books

    return plain_books


@pytest.fixture
def books(tmp_path):
    path = tmp_path / "books.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(book) + "\n" for book in BOOKS).encode()))
    return path


def run(plain_books, books, tmp_path):
    out = tmp_path / "plain.jsonl.xz"
    plain_books.main(["--books", str(books), "--out", str(out)])
    return read_documents([out])


def test_books_become_plain_paragraphs(plain_books, books, tmp_path):
    assert run(plain_books, books, tmp_path) == PLAIN


def test_nothing_is_overwritten(plain_books, books, tmp_path):
    run(plain_books, books, tmp_path)
    with pytest.raises(FileExistsError):
        run(plain_books, books, tmp_path)


TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@pytest.mark.slow
def test_it_goes_from_books_to_a_calibrated_model_with_its_card(tmp_path):
    rng = random.Random(0)
    syllables = [first + second for first in "bcdfglmnprst" for second in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(40_000)]
    book = tmp_path / "book.txt"
    book.write_text("# I\n\n" + " ".join(words))
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    settings = {
        "CONFIG": config,
        "MEGABYTES": 0.05,
        "CONTEXT": 128,
        "STEPS": 3,
        "LONG_STEPS": 2,
        "CACHE_STEPS": 2,
        "BATCH": 2,
        "EVALUATED": 2048,
        "EXTRA": "--dtype float32",
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
    }
    recipe = [RECIPES / "embedded.sh", book, book, tmp_path / "work"]
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    subprocess.run(recipe, cwd=RECIPES.parent, env=environment, check=True)
    model = tmp_path / "work" / "model"
    assert calibrated_names(model) == ["h1b"]
    card = (model / "README.md").read_text("utf-8")
    for text in ("plain", "retrieval", "held_out"):
        assert f"\n- {text}.jsonl.xz: " in card
    assert "\n| plain, whole context | everything | 2 | 2 of 512 tokens |" in card
    assert "\npython recipes/plain_books.py --books " in card
