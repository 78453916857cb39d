"""The recipe of the model that ships inside: which text it is trained on."""

import json
import lzma
from pathlib import Path

import pytest

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
