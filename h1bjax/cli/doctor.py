"""`h1bjax doctor`: devices, versions, and which kernels will run and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import add_cache, add_json, positive
from h1bjax.cli.report import human_bytes, print_json

if TYPE_CHECKING:
    from h1bjax.config import LlamaConfig
    from h1bjax.doctor import Report

_SHAPE = "llama-3-8b"


def add_parser(commands: Any) -> None:
    """Adds the command to those of the program."""
    parser = commands.add_parser(
        "doctor",
        help="show devices, versions, and which kernels will run and why",
        description="Shows devices, versions, and which kernels will run and why, and tries one "
        "decode step of a layer. Exits with 2 if something is broken.",
    )
    parser.set_defaults(run=_run)
    add_cache(parser)
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a folder in Hugging Face layout, or a hub id, of which only config.json is read",
    )
    heads.add_argument(
        "--head-dim",
        type=positive,
        default=128,
        metavar="N",
        help=f"without --model, channels of the heads of {_SHAPE}; default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the arithmetic; default: %(default)s",
    )
    add_json(parser, "print one JSON object")


def _run(options: argparse.Namespace) -> None:
    from h1bjax.doctor import examine

    config = _config(options)
    report = examine(options.cache, config, options.dtype)
    if options.json:
        print_json(asdict(report))
    else:
        _print(report, options, config)
    if report.problems:
        raise ValueError("; ".join(report.problems))


def _config(options: argparse.Namespace) -> LlamaConfig:
    if options.model is not None:
        from h1bjax.checkpoint import resolve_model
        from h1bjax.config import LlamaConfig

        return LlamaConfig.from_hf(resolve_model(options.model, config_only=True))
    if options.head_dim % 2:
        raise ValueError(f"--head-dim {options.head_dim} must be even, because RoPE turns pairs")
    from h1bjax.bench.shapes import SHAPES

    return replace(SHAPES[_SHAPE], head_dim=options.head_dim)


def _print(report: Report, options: argparse.Namespace, config: LlamaConfig) -> None:
    print(report.system)
    _print_table("versions", list(report.versions.items()))
    _print_table(
        "extras",
        [
            (extra, f"needs {' and '.join(missing)}" if missing else "installed")
            for extra, missing in report.extras.items()
        ],
    )
    devices = []
    for found in report.devices:
        memory = "" if found.memory is None else f", {human_bytes(found.memory)} each for JAX"
        if memory and found.used is not None:
            memory += f", {human_bytes(found.used)} of the first in use"
        devices.append((found.platform, f"{found.count} × {found.kind}{memory}"))
    _print_table("devices that JAX uses", devices or [("none", "")])
    title = (
        f"how the cache {options.cache} runs for {config.num_heads} heads and "
        f"{config.num_kv_heads} KV heads of {config.head_dim} channels, {options.dtype}"
    )
    if report.operations:
        _print_table(
            title, [(one.name, one.implementation, one.reason) for one in report.operations]
        )
    if report.seconds is not None:
        print(f"\na decode step of one layer took {report.seconds:.1f} s, with compilation")
    for note in report.notes:
        print(f"\nnote: {note}")
    if not report.problems:
        print("\nno problems found")


def _print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"  {'  '.join(cells)}".rstrip())
