"""The command line.

Every command has a module here. Only argparse is imported before the arguments are known to be
good, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, TextIO

from h1bjax.cli import (
    bench,
    cache_size,
    calibrate,
    convert,
    doctor,
    finetune,
    generate,
    perplexity,
    processes,
    retrieval,
    tasks,
)

PROGRAM = "h1bjax"

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those after the program's name; by default the process's own.

    Returns:
        The exit code: 0; 2 after an error, which is one line on stderr; 130 when interrupted;
        141 when nobody reads stdout any more.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options = _parser().parse_args(arguments)
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        _report("interrupted")
        return EXIT_INTERRUPTED
    # JAX reports a missing device or exhausted memory as a RuntimeError; an ImportError is an
    # optional package that is not installed.
    except (
        ValueError,
        OSError,
        ArithmeticError,
        MemoryError,
        RuntimeError,
        ImportError,
    ) as error:
        _report(f"error: {error}" if str(error) else f"error: {type(error).__name__}")
        if processes.are_joined():
            _report("this ends the process; if another one was lost, its own messages say why")
            # An orderly end would wait for processes that never come, and then abort.
            os._exit(EXIT_ERROR)
        return EXIT_ERROR
    except AssertionError:
        # JAX asserts where JAX_PLATFORMS names a platform for which nothing is installed.
        if (problem := _missing_platform()) is None:
            raise
        _report(f"error: {problem}")
        return EXIT_ERROR
    return 0


def _missing_platform() -> str | None:
    """Why JAX has no device at all, if so."""
    from h1bjax.doctor.machine import jax_devices

    try:
        jax_devices()
    except RuntimeError as error:
        return str(error)
    return None


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing usage, and takes no abbreviated options."""

    def __init__(self, **keywords: Any):
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Run Llama-family models in JAX from a compressed key-value cache.",
        epilog=f"'{PROGRAM} COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate.add_parser(commands)
    calibrate.add_parser(commands)
    finetune.add_parser(commands)
    evaluate = commands.add_parser(
        "eval",
        help="measure a model's quality",
        description="Measures a model's quality through a cache. Perplexity and retrieval need "
        "nothing more; the other measures are benchmarks of lm-evaluation-harness, for which "
        "there is the extra 'eval'.",
    )
    measures = evaluate.add_subparsers(title="measures", metavar="MEASURE", required=True)
    for measure in (perplexity, retrieval, tasks):
        measure.add_parser(measures)
    cache_size.add_parser(commands)
    bench.add_parser(commands)
    convert.add_parser(commands)
    doctor.add_parser(commands)
    return parser


def _version() -> str:
    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        return "(a source tree that is not installed)"


def _report(message: str) -> None:
    """One line on stderr."""
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _report(f"warning: {message}")
