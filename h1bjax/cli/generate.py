"""`h1bjax generate`: continues prompts."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import add_cache, add_dtype, add_json, add_model, load_model, positive
from h1bjax.cli.processes import add_mesh, join_processes
from h1bjax.cli.report import cache_report, print_json, print_summary

if TYPE_CHECKING:
    from h1bjax.cache import KVCache
    from h1bjax.model import Model


def add_parser(commands: Any) -> None:
    """Adds the command to those of the program."""
    parser = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continues prompts. The text goes to stdout; what the cache costs, and the "
        "speed, to stderr.",
    )
    parser.set_defaults(run=_run)
    add_model(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        dest="prompts",
        help="text to continue; repeat it to continue several at once",
    )
    add_cache(parser)
    add_dtype(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="the most tokens that each prompt gets; default: %(default)s",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the default, takes the most probable token",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K best; 0 is off"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the best tokens that reach probability P; 1 is off",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens less than P times as probable as the best; 0 is off",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of sampling; default: %(default)s"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeat it to give several",
    )
    parser.add_argument(
        "--exact-prefill",
        action="store_true",
        help="let prompts read themselves exactly and compress them only for decoding",
    )
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    add_json(parser, "print one JSON object")
    add_mesh(parser)


def _run(options: argparse.Namespace) -> None:
    if options.stream and options.json:
        raise ValueError("--stream prints text as it comes and --json one object: choose one")
    if options.stream and len(options.prompts) > 1:
        raise ValueError(f"--stream takes one prompt, not {len(options.prompts)}")
    first = join_processes(options)
    from h1bjax.sampling import Sampling

    # Loading may take minutes, so what can be checked without a model is checked before.
    Sampling.create(options.temperature, options.top_k, options.top_p, options.min_p)
    model = load_model(options)
    chosen = {
        name: getattr(options, name)
        for name in (
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "seed",
            "stop",
            "exact_prefill",
        )
    }
    if options.stream:
        summary = _stream(model, options.prompts[0], chosen)
        if first:
            print_summary(model, *summary)
        return
    out = model.generate(options.prompts, **chosen)
    assert out.text is not None
    if options.json:
        print_json(
            {
                "text": out.text,
                "tokens": out.tokens,
                "cache": cache_report(model, out.cache),
                "tokens_per_second": out.tokens_per_second,
            }
        )
        return
    for index, (prompt, text) in enumerate(zip(options.prompts, out.text, strict=True)):
        if len(options.prompts) > 1:
            print(f"{'' if index == 0 else chr(10)}==> prompt {index + 1} <==")
        print(prompt + text)
    sys.stdout.flush()
    if first:
        print_summary(model, out.cache, sum(map(len, out.tokens)), out.tokens_per_second)


def _stream(model: Model, prompt: str, chosen: dict[str, Any]) -> tuple[KVCache, int, float | None]:
    """Prints the text as it comes; returns the cache, the number of tokens and their speed."""
    count, begin, end = 0, None, None
    step = None
    for step in model.stream(prompt, **chosen):
        assert step.text is not None
        if begin is None:
            print(prompt, end="")
        print(step.text[0], end="", flush=True)
        count += step.tokens[0] is not None
        end = time.perf_counter()
        # The clock starts after the first step, which compiles.
        begin = end if begin is None else begin
    print()
    sys.stdout.flush()
    assert step is not None and begin is not None and end is not None
    speed = (count - 1) / (end - begin) if count > 1 else None
    return step.cache, count, speed
