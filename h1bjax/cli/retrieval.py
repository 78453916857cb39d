"""`h1bjax eval retrieval`: what caches still find in long contexts."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import add_dtype, add_json, add_model, load_model, positive
from h1bjax.cli.report import print_json

if TYPE_CHECKING:
    from h1bjax.retrieval_grid import RetrievalGrid, RetrievalScores


def add_parser(measures: Any) -> None:
    """Adds the measure to those of `h1bjax eval`."""
    parser = measures.add_parser(
        "retrieval",
        help="find numbers again in contexts of several lengths",
        description="Hides numbers in contexts of several lengths and asks for them, with the "
        "same questions for every cache. Prints the shares that were found.",
    )
    parser.set_defaults(run=_run)
    add_model(parser)
    parser.add_argument(
        "--cache",
        nargs="+",
        default=["exact", "h1b"],
        metavar="PRESET",
        help="cache presets to compare; default: exact h1b",
    )
    add_dtype(parser)
    parser.add_argument(
        "--context",
        type=positive,
        nargs="+",
        required=True,
        metavar="N",
        help="tokens of the windows, one length or several",
    )
    parser.add_argument(
        "--depths",
        type=positive,
        default=5,
        metavar="N",
        help="places of the passkey, from the text's beginning to its end; default: %(default)s",
    )
    parser.add_argument(
        "--windows",
        type=positive,
        default=8,
        metavar="N",
        help="windows at each length and depth; default: %(default)s",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=8,
        metavar="N",
        help="windows at a time; default: %(default)s",
    )
    parser.add_argument(
        "--filler",
        nargs="+",
        metavar="FILE",
        help="text around the passkeys, .txt or .jsonl; by default sentences of no content",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of numbers and names; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw a heat map into this file")
    add_json(parser, "print one JSON object")


def _run(options: argparse.Namespace) -> None:
    presets = list(dict.fromkeys(options.cache))
    from h1bjax.cache import CacheSpec

    specs = [CacheSpec.preset(name) for name in presets]
    if options.out is not None:
        _check_picture(options.out)
    from h1bjax.passkey import FILLER
    from h1bjax.retrieval_grid import retrieval_grid, score_caches
    from h1bjax.text_files import read_documents

    filler = [FILLER] if options.filler is None else read_documents(options.filler)
    options.cache = presets[0]
    first = load_model(options)
    for spec in specs:
        spec.check_head_dim(first.config.head_dim)
    grid = retrieval_grid(
        first,
        options.context,
        depths=options.depths,
        windows=options.windows,
        filler=filler,
        seed=options.seed,
    )

    def models() -> Any:
        """One after another, so that one at a time needs memory."""
        nonlocal first
        yield first
        del first
        for name in presets[1:]:
            options.cache = name
            yield load_model(options)

    scores = []
    for score in score_caches(grid, models(), batch=options.batch):
        scores.append(score)
        if not options.json:
            _print(grid, score)
            sys.stdout.flush()
    if options.json:
        print_json(_report(grid, scores))
    if options.out is not None:
        from h1bjax.heat_map import draw_heat_map

        draw_heat_map(grid, scores, options.out)


def _check_picture(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, and is {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No such folder: {path.parent}")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("a heat map needs matplotlib: pip install 'h1bjax[eval]'")


def _print(grid: RetrievalGrid, score: RetrievalScores) -> None:
    """A small table: a row for each depth, and one for the key-value lines."""
    print(f"{score.preset} ({score.bytes_per_token} bytes per token and KV head)")
    print("".join([f"{'context':<14}", *(f"{context:>8}" for context in grid.contexts)]))
    for index, depth in enumerate(grid.depths):
        cells = [f"{100 * one.found[index]:>7.1f}%" for one in score.passkeys]
        print("".join([f"{f'passkey {depth:.0%}':<14}", *cells]))
    cells = [f"{100 * one.accuracy:>7.1f}%" for one in score.key_values]
    print("".join([f"{'key-value':<14}", *cells]))


def _report(grid: RetrievalGrid, scores: list[RetrievalScores]) -> dict[str, Any]:
    return {
        "contexts": list(grid.contexts),
        "depths": list(grid.depths),
        "presets": [
            {
                "preset": score.preset,
                "bytes_per_token": score.bytes_per_token,
                # By context, and within it by depth.
                "passkey_found": [list(one.found) for one in score.passkeys],
                "passkey_nats_per_digit": [list(one.nats_per_digit) for one in score.passkeys],
                "key_value_accuracy": [one.accuracy for one in score.key_values],
                "key_value_bits_per_byte": [one.bits_per_byte for one in score.key_values],
            }
            for score in scores
        ],
    }
