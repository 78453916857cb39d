"""Making a byte-level BPE tokenizer: `python -m train.tokenizer --text FILES --out DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from h1bjax.checkpoint import check_destination
from h1bjax.text_files import read_documents

END = "<|end|>"
"""The special token that ends a document; its id is 0."""

PIECE = 100_000
"""Characters of a document that are counted at a time: whole books take ten times as long."""

SMALLEST = 1 + 256
"""The end token and every byte."""


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer in the manner of GPT-2.

    Every byte is a token, so that any text can be written. Nothing is put before or after a text.

    Args:
        documents: what merges are counted on.
        vocab_size: tokens, the end token included.

    Raises:
        ValueError: the vocabulary is too small for all bytes, or too large for the text.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"a vocabulary of {vocab_size} is too small; {SMALLEST} is the least")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_pieces(documents), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise ValueError(
            f"the text gives only {found} tokens, not {vocab_size}; give more text or a smaller "
            "vocabulary"
        )
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: str | PathLike[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers and h1bjax load.

    Raises:
        ValueError: the folder is not empty, or is a file.
    """
    folder = Path(folder)
    check_destination(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    written = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(written, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m train.tokenizer", description="Make a byte-level BPE tokenizer from text."
    )
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, or compressed"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    options = parser.parse_args(arguments)
    try:
        check_destination(Path(options.out))
        tokenizer = train_tokenizer(read_documents(options.text), options.vocab_size)
        save_tokenizer(tokenizer, options.out)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _pieces(documents: Sequence[str]) -> Iterator[str]:
    for document in documents:
        for begin in range(0, len(document), PIECE):
            yield document[begin : begin + PIECE]


if __name__ == "__main__":
    sys.exit(main())
