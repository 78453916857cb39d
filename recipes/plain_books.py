"""Books as plain paragraphs: less for a small model to learn than Markdown.

    python recipes/plain_books.py --books BOOKS.jsonl.xz --out plain.jsonl.xz

BOOKS are .txt or .jsonl files in Markdown, as `h1bjax.text_files.read_documents` takes them.
"""

import argparse
import json
import lzma
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from h1bjax.text_files import read_documents

STRAIGHT = str.maketrans("“”‘’", "\"\"''", "\r\ufeff\u200b\u2060") | {ord("—"): "--"}


def plain(text: str) -> str:
    """A book's paragraphs, without headings and rules, with straight quotes and line ends."""
    paragraphs = re.split(r"\n\s*\n", text.translate(STRAIGHT))
    kept = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs]
    return "\n\n".join(p for p in kept if p and not re.match(r"#|[-*_ ]+$", p))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--books", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .jsonl.xz")
    options = parser.parse_args(arguments)
    books = read_documents(options.books)
    with lzma.open(options.out, "xt", encoding="utf-8") as file:
        for book in books:
            file.write(json.dumps({"text": plain(book)}, ensure_ascii=False) + "\n")
    print(f"wrote {len(books)} books to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
