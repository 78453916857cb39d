"""`h1bjax cache-size`: what each cache preset costs a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import add_json, add_model, positive
from h1bjax.cli.report import human_bytes, print_json

if TYPE_CHECKING:
    from h1bjax.config import LlamaConfig


def add_parser(commands: Any) -> None:
    """Adds the command to those of the program."""
    parser = commands.add_parser(
        "cache-size",
        help="show what each cache preset costs",
        description="Lists all cache presets with the bytes that they cost a model, window and "
        "padding included. Of the model, only config.json is read.",
    )
    parser.set_defaults(run=_run)
    add_model(parser)
    parser.add_argument(
        "--context", type=positive, required=True, metavar="N", help="tokens of each sequence"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="sequences; default: %(default)s"
    )
    add_json(parser, "print a JSON list")


def _run(options: argparse.Namespace) -> None:
    from h1bjax.cache import PRESETS
    from h1bjax.checkpoint import resolve_model
    from h1bjax.config import LlamaConfig

    config = LlamaConfig.from_hf(resolve_model(options.model, config_only=True))
    window = config.sliding_window
    if window is not None and options.context > window:
        raise ValueError(
            f"--context {options.context} exceeds the model's sliding window of {window} tokens, "
            "which the cache does not implement"
        )
    sizes = {"batch": options.batch, "max_length": options.context}
    exact = PRESETS["exact"].nbytes(config, **sizes)
    rows: list[dict[str, Any]] = []
    for name, spec in PRESETS.items():
        try:
            spec.check_head_dim(config.head_dim)
        except ValueError as error:
            rows.append({"preset": name, "problem": str(error)})
            continue
        nbytes = spec.nbytes(config, **sizes)
        rows.append(
            {
                "preset": name,
                "bytes_per_token_head": spec.bytes_per_token(config.head_dim),
                "nbytes": nbytes,
                "ratio": exact / nbytes,
            }
        )
    if options.json:
        print_json(rows)
        return
    _print_sizes(config, rows, options.context, options.batch)


def _print_sizes(config: LlamaConfig, rows: list[dict[str, Any]], context: int, batch: int) -> None:
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    print(
        f"{sequences} of {context} tokens, {config.num_layers} layers, "
        f"{config.num_kv_heads} KV heads of {config.head_dim} channels"
    )
    header = ("preset", "bytes per token and KV head", "total", "bf16 / total")
    table = [
        header,
        *(
            (
                row["preset"],
                str(row["bytes_per_token_head"]),
                human_bytes(row["nbytes"]),
                f"{row['ratio']:.2f}",
            )
            for row in rows
            if "problem" not in row
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells))
    for row in rows:
        if "problem" in row:
            print(f"not possible: {row['preset']}: {row['problem']}")
