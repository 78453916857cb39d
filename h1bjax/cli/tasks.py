"""`h1bjax eval gsm8k` and the like: benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import add_cache, add_dtype, add_json, add_model, load_model, positive
from h1bjax.cli.report import print_json

if TYPE_CHECKING:
    from h1bjax.harness.tasks import Chosen

BENCHMARKS = {
    "gsm8k": "school mathematics, 8 solved examples before each problem",
    "mmlu": "multiple choice in 57 subjects, 5 solved examples before each question",
    "humaneval": "Python functions, judged by running them",
    "wikitext": "perplexity of whole articles in windows of the model's context",
    "longeval-lines": "one line of many, asked for at the end of a long prompt",
}
"""What the benchmarks are, by name."""

_PRINTED = "Prints a line for each task and metric, with its standard error."


def add_parser(measures: Any) -> None:
    """Adds the benchmarks, and any other task, to the measures of `h1bjax eval`."""
    for name, help in BENCHMARKS.items():
        parser = measures.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}. {_PRINTED}"
        )
        parser.set_defaults(run=_run_benchmark, benchmark=name)
        add_model(parser)
        parser.add_argument(
            "--data",
            type=Path,
            metavar="PATH",
            required=name == "longeval-lines",
            help="a local file as published, or its folder"
            + ("" if name == "longeval-lines" else "; by default the data come from the hub"),
        )
        _add_options(parser, code=name == "humaneval")
    parser = measures.add_parser(
        "task",
        help="any other task of lm-evaluation-harness",
        description=f"Runs tasks of lm-evaluation-harness; 'lm_eval ls tasks' lists them. "
        f"{_PRINTED}",
    )
    parser.set_defaults(run=_run_tasks)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a task, group or tag")
    add_model(parser)
    _add_options(parser, code=True)


def _add_options(parser: argparse.ArgumentParser, *, code: bool) -> None:
    add_cache(parser)
    add_dtype(parser)
    for name, kind, help in [
        ("--batch", "N", "questions at a time; default: %(default)s"),
        ("--max-length", "N", "the most tokens to read; by default as many as the model is for"),
        ("--limit", "N", "only the first N questions of each task"),
        ("--max-new-tokens", "N", "the most tokens of an answer, in the place of the task's own"),
    ]:
        parser.add_argument(
            name, type=positive, default=8 if name == "--batch" else None, metavar=kind, help=help
        )
    parser.add_argument(
        "--shots",
        type=_count,
        metavar="N",
        help="solved examples before each question; by default the usual number",
    )
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    if code:
        parser.add_argument(
            "--run-generated-code",
            action="store_true",
            help="allow programs that the model writes to run on this machine",
        )
    parser.set_defaults(run_generated_code=False)
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all results to this file")
    add_json(parser, "print one JSON object")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _run_benchmark(options: argparse.Namespace) -> None:
    if options.benchmark == "humaneval":
        from h1bjax.harness.programs import check_allowed

        check_allowed(options.run_generated_code)
    if options.data is not None:
        from h1bjax.harness.local_data import find_files

        find_files(options.benchmark, options.data)
    _prepare(options)
    from h1bjax.harness.tasks import SHOTS, hub_tasks, local_tasks

    if options.shots is None:
        options.shots = SHOTS.get(options.benchmark)
    # Loading a model may take minutes, so what can be checked without it is checked before.
    with tempfile.TemporaryDirectory(prefix="h1bjax-eval-") as folder:
        if options.data is None:
            chosen = hub_tasks(options.benchmark, Path(folder))
        else:
            chosen = local_tasks(options.benchmark, options.data, Path(folder))
        _score(chosen, options)


def _run_tasks(options: argparse.Namespace) -> None:
    _prepare(options)
    from h1bjax.harness.tasks import named_tasks

    _score(named_tasks(options.names), options)


def _prepare(options: argparse.Namespace) -> None:
    """Checks that results can be written and tasks be run, and makes the harness quiet."""
    if options.out is not None and not options.out.parent.is_dir():
        raise FileNotFoundError(f"No such folder: {options.out.parent}")
    if not sys.stderr.isatty():
        # Read when tqdm is imported; the harness shows its bars everywhere.
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Its warnings are about its own definitions of tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from h1bjax.harness.run import quieten

    quieten()


def _score(chosen: Chosen, options: argparse.Namespace) -> None:
    from h1bjax.harness.run import run_tasks

    tokens = options.max_new_tokens
    report = run_tasks(
        load_model(options),
        chosen,
        run_generated_code=options.run_generated_code,
        batch=options.batch,
        max_length=options.max_length,
        limit=options.limit,
        shots=options.shots,
        chat=options.chat,
        generation=None if tokens is None else {"max_gen_toks": tokens},
    )
    if options.out is not None:
        text = json.dumps(report, indent=1, allow_nan=False)
        options.out.write_text(f"{text}\n", encoding="utf-8")
    if options.json:
        print_json(report)
        return
    _print(report.get("groups", {}) | report["results"])
    config = report["config"]
    print(
        f"cache {config['cache']}: {config['cache_bytes_per_token_and_head']} bytes per token and "
        "KV head",
        file=sys.stderr,
    )


def _print(results: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each task and metric."""
    lines = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            lines.append((task, name, f"{value:.4f}", "" if error is None else f"± {error:.4f}"))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for task, name, number, error in lines:
        row = f"{task:<{widths[0]}}  {name:<{widths[1]}}  {number:>{widths[2]}} {error}"
        print(row.rstrip())
