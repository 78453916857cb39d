r"""Writes training text in which remembering pays: repeated passages, and codes that are asked for.

Books hardly repeat themselves, and a small model that reads nothing else does not learn to copy.
A share of such text teaches it, so that a study can see what a cache forgets:

    python benchmarks/retrieval_text.py --text BOOKS.jsonl.xz --megabytes 30 \
        --out retrieval.jsonl.xz
"""

import argparse
import json
import lzma
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from h1bjax.retrieval import key_value_lines
from h1bjax.text_files import read_documents

PASSAGE = (100, 1600)
"""Characters of a passage that is repeated."""
PLACES = (2, 6)
"""How often it stands in a document."""
BETWEEN = 6500
"""At most so many characters of other text lie between two of its places, mostly far fewer."""
LINES = (4, 110)
"""Lines with codes in a document, each of which is repeated behind them, in another order."""


def main() -> int:
    """Parses the arguments and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="passages' source")
    parser.add_argument("--megabytes", type=float, required=True, help="UTF-8 bytes to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", required=True, metavar="FILE", help="a new .jsonl.xz file")
    options = parser.parse_args()
    if not options.out.endswith(".jsonl.xz"):
        parser.error(f"--out must end in .jsonl.xz, and is {options.out}")
    if not options.megabytes > 0:
        parser.error(f"--megabytes must be positive, and is {options.megabytes}")
    books = read_documents(options.text)
    long_enough = [book for book in books if len(book) >= 2 * BETWEEN]
    if not long_enough:
        parser.error(f"no document of {' '.join(options.text)} has {2 * BETWEEN} characters")
    generator = np.random.default_rng(options.seed)
    wanted = int(options.megabytes * 1e6)
    with (
        lzma.open(Path(options.out), "xt", preset=1, encoding="utf-8") as file,
        tqdm(total=wanted, unit="B", unit_scale=True, disable=None) as progress,
    ):
        written = 0
        for document in documents(long_enough, generator):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            size = len(document.encode())
            written += size
            progress.update(size)
            if written >= wanted:
                return 0
    return 0


def documents(books: Sequence[str], generator: np.random.Generator) -> Iterator[str]:
    """Documents without end, those of repeated passages and of codes by turns."""
    while True:
        yield repeated_passage(books, generator)
        yield codes(generator)


def repeated_passage(books: Sequence[str], generator: np.random.Generator) -> str:
    """A passage, other text, the passage again, and so on."""
    book = books[int(generator.integers(len(books)))]
    passage = _excerpt(book, int(generator.integers(*PASSAGE)), generator)
    parts = [passage]
    for _ in range(int(generator.integers(*PLACES)) - 1):
        # Short distances are easier, and learnt first: the square favours them.
        between = int(BETWEEN * generator.random() ** 2)
        parts += [_excerpt(book, between, generator), passage]
    return "\n".join(parts)


def codes(generator: np.random.Generator) -> str:
    """Lines that name codes, and further on each of them again."""
    lines = [line.text for line in key_value_lines(int(generator.integers(*LINES)), generator)]
    repeats = [lines[index] for index in generator.permutation(len(lines))]
    return "".join([*lines, *repeats])


def _excerpt(text: str, length: int, generator: np.random.Generator) -> str:
    begin = int(generator.integers(len(text) - length))
    return text[begin : begin + length]


if __name__ == "__main__":
    sys.exit(main())
