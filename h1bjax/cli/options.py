"""Options that several commands take, and the model that they describe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from h1bjax.model import Model


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model; None stands for the model that ships inside the package."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a folder in Hugging Face layout, or a hub id; by default the small model that ships "
        "with h1bjax",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """Adds --text, one file or several that `read_documents` reads."""
    parser.add_argument(
        "--text",
        required=True,
        nargs="+",
        metavar="FILE",
        help='UTF-8 text (.txt), or JSON lines with a string "text" (.jsonl), one document each; '
        "also compressed, as in .jsonl.xz (.gz, .xz or .zst)",
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Adds --cache, one preset."""
    parser.add_argument(
        "--cache",
        default="h1b",
        metavar="PRESET",
        help="cache preset, of which cache-size lists all; default: %(default)s",
    )


def add_dtype(parser: argparse.ArgumentParser, of: str = "weights and arithmetic") -> None:
    """Adds --dtype, that of what `of` names; "auto" stands for the checkpoint's."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help=f"of {of}; auto, the default, is the checkpoint's",
    )


def add_json(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds --json, explained by `help`."""
    parser.add_argument("--json", action="store_true", help=help)


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def load_model(options: argparse.Namespace) -> Model:
    """The model that --model, --cache, --dtype and, where there is one, --mesh describe."""
    from h1bjax.model import load

    dtype = None if options.dtype == "auto" else options.dtype
    mesh = getattr(options, "mesh", None)
    return load(options.model, cache=options.cache, dtype=dtype, mesh=mesh)
