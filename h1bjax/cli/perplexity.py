"""`h1bjax eval perplexity`: scores a text through the cache."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import (
    add_cache,
    add_dtype,
    add_json,
    add_model,
    add_text,
    load_model,
    positive,
)
from h1bjax.cli.report import cache_report, print_cache, print_json

if TYPE_CHECKING:
    from h1bjax.window_scores import Loss


def add_parser(measures: Any) -> None:
    """Adds the measure to those of `h1bjax eval`."""
    parser = measures.add_parser(
        "perplexity",
        help="score a text through the cache",
        description="Scores a text, each window of it read through an empty cache as decoding "
        "reads. 'late' are the tokens in the last quarter of full windows.",
    )
    parser.set_defaults(run=_run)
    add_model(parser)
    add_text(parser)
    add_cache(parser)
    add_dtype(parser)
    parser.add_argument(
        "--context",
        type=positive,
        required=True,
        metavar="N",
        help="tokens of the windows that the text is cut into",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=8,
        metavar="N",
        help="windows at a time; default: %(default)s",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="score only the first windows that together have at most N tokens",
    )
    add_json(parser, "print one JSON object")


def _run(options: argparse.Namespace) -> None:
    from h1bjax.text_files import read_documents

    documents = read_documents(options.text)
    from h1bjax.evaluate import perplexity

    model = load_model(options)
    result = perplexity(
        model, documents, context=options.context, batch=options.batch, tokens=options.tokens
    )
    if options.json:
        print_json(
            {
                "nats_per_token": result.nats_per_token,
                "bits_per_byte": result.bits_per_byte,
                "tokens": result.tokens,
                "bytes": result.bytes,
                "late": _late_report(result.late),
                "cache": cache_report(model, result.cache),
            }
        )
        return
    print(f"nats per token  {result.nats_per_token:.6f}")
    print(f"bits per byte   {result.bits_per_byte:.6f}")
    if result.late is not None:
        print(f"  late          {result.late.bits_per_byte:.6f}")
    print(f"perplexity      {result.perplexity:.4f}")
    print(f"tokens          {result.tokens}")
    print(f"bytes           {result.bytes}")
    sys.stdout.flush()
    print_cache(cache_report(model, result.cache))


def _late_report(late: Loss | None) -> dict[str, Any] | None:
    """The tokens in the last quarter of a full window; None where there are none."""
    if late is None:
        return None
    return {"bits_per_byte": late.bits_per_byte, "tokens": late.tokens, "bytes": late.bytes}
