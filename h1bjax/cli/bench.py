"""`h1bjax bench decode` and `h1bjax bench prefill`: the speed and memory of whole models."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import add_json, positive
from h1bjax.cli.report import human_bytes, print_json

if TYPE_CHECKING:
    from h1bjax.bench.case import Case, Measured
    from h1bjax.config import LlamaConfig

_EXACT = "exact"
_ONE_DEVICE = "none"


def add_parser(commands: Any) -> None:
    """Adds the command to those of the program."""
    bench = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measures speed and memory of whole models, with random weights: only shapes "
        "matter.",
    )
    subjects = bench.add_subparsers(title="subjects", metavar="SUBJECT", required=True)

    decode = subjects.add_parser(
        "decode",
        help="decode steps of a whole model",
        description="Times decode steps of a whole model for one cache after another, and prints "
        "a table.",
    )
    decode.set_defaults(run=_run_decode)
    _add_common(decode)
    decode.add_argument(
        "--largest-batch",
        action="store_true",
        help="measure each cache with as many sequences as memory holds too, "
        "or only so where --batch is not given",
    )
    decode.add_argument(
        "--steps",
        type=positive,
        default=32,
        metavar="N",
        help="decode steps of a run; default: %(default)s",
    )
    decode.add_argument(
        "--peer",
        choices=("transformers",),
        help="measure transformers' static cache and compiled step as well, on one device (needs "
        "torch)",
    )
    decode.add_argument(
        "--mesh",
        nargs="+",
        default=[],
        metavar="SIZES",
        help="devices along each axis, such as batch=2,tensor=4,sequence=1: rows, heads, tokens; "
        f"one mesh or several, and {_ONE_DEVICE} for one device; default: {_ONE_DEVICE}",
    )

    prefill = subjects.add_parser(
        "prefill",
        help="reading prompts into the cache of a whole model",
        description="Times how prompts are read into the cache of a whole model, for one cache "
        "after another, and prints a table.",
    )
    prefill.set_defaults(run=_run_prefill)
    _add_common(prefill)


def _add_common(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a folder in Hugging Face layout, or a hub id, of which only config.json is read; by "
        "default the small model that ships with h1bjax",
    )
    model.add_argument("--shape", metavar="NAME", help="such as llama-3-8b or llama-3.2-1b")
    parser.add_argument(
        "--cache",
        nargs="+",
        default=[_EXACT, "h1b"],
        metavar="PRESET",
        help="cache presets, of which cache-size lists all; default: exact h1b",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        default=[],
        metavar="N",
        help="sequences, one number or several; default: 1",
    )
    parser.add_argument(
        "--context",
        type=positive,
        required=True,
        metavar="N",
        help="tokens that each sequence holds at the end",
    )
    parser.add_argument(
        "--repetitions",
        type=positive,
        default=5,
        metavar="N",
        help="runs, of which the median counts; default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of weights and arithmetic; default: %(default)s",
    )
    add_json(parser, "print lines of JSON: the settings, then one object for each measurement")


def _run_decode(options: argparse.Namespace) -> None:
    if options.steps >= options.context:
        raise ValueError(f"--steps {options.steps} must be fewer than --context {options.context}")
    case = replace(_case(options), steps=options.steps)
    batches: list[int | None] = list(options.batch)
    if options.largest_batch:
        batches.append(None)
    batches = batches or [1]
    jobs = []
    for batch, mesh in itertools.product(batches, _meshes(options, case.config, batches)):
        one = replace(case, batch=batch, mesh=mesh)
        found = [("decode", name, replace(one, preset=name)) for name in options.cache]
        if options.peer is not None and batch is not None and mesh is None:
            found.append((options.peer, options.peer, replace(one, preset=options.peer)))
        jobs.append(found)
    _measure(options, case, "ms per step", jobs)


def _meshes(
    options: argparse.Namespace, config: LlamaConfig, batches: list[int | None]
) -> list[str | None]:
    """The meshes to measure, None for one device, which comes first: others are compared with it.

    Raises:
        ValueError: a mesh does not suit the model or a batch, or the peer has no device.
    """
    from h1bjax.bench.placement import check_rows, check_sizes

    sizes = [mesh for mesh in options.mesh if mesh != _ONE_DEVICE]
    for mesh in sizes:
        divided = check_sizes(mesh, config)
        for batch in batches:
            if batch is not None:
                check_rows(divided, batch)
    if len(sizes) < len(options.mesh) or not sizes:
        return [None, *sizes]
    if options.peer is not None:
        raise ValueError(f"--peer runs on one device; add {_ONE_DEVICE} to --mesh")
    return [*sizes]


def _run_prefill(options: argparse.Namespace) -> None:
    case = _case(options)
    jobs = []
    for batch in options.batch or [1]:
        found = []
        for name in options.cache:
            one = replace(case, preset=name, batch=batch)
            found.append(("prefill", name, one))
            if name != _EXACT:
                found.append(
                    ("prefill", f"{name}, exact prefill", replace(one, exact_prefill=True))
                )
        jobs.append(found)
    _measure(options, case, "ms for all prompts", jobs)


def _case(options: argparse.Namespace) -> Case:
    """What all measurements share.

    Raises:
        ValueError: a preset or the shape is unknown.
        FileNotFoundError: there is no such model.
    """
    from h1bjax.bench.case import Case
    from h1bjax.cache import CacheSpec

    for preset in options.cache:
        CacheSpec.preset(preset)
    return Case(
        config=_config(options),
        preset=_EXACT,
        batch=1,
        context=options.context,
        repetitions=options.repetitions,
        dtype=options.dtype,
    )


def _config(options: argparse.Namespace) -> LlamaConfig:
    if options.shape is None:
        from h1bjax.checkpoint import resolve_model
        from h1bjax.config import LlamaConfig

        return LlamaConfig.from_hf(resolve_model(options.model, config_only=True))
    from h1bjax.bench.shapes import SHAPES

    if options.shape not in SHAPES:
        raise ValueError(f"unknown shape {options.shape!r}; choose one of {', '.join(SHAPES)}")
    return SHAPES[options.shape]


def _measure(
    options: argparse.Namespace, case: Case, unit: str, jobs: list[list[tuple[str, str, Case]]]
) -> None:
    """Runs and prints jobs: lists of which each is compared with its own exact cache.

    On a mesh each is compared, too, with the same cache and batch on one device.
    """
    from h1bjax.bench.worker import run

    _print_head(options, case, unit)
    devices: dict[str, None] = {}
    alone: dict[tuple[str, int], Measured] = {}
    for compared in jobs:
        exact = None
        for kind, name, one in compared:
            found = run(kind, one)
            if isinstance(found, str):
                _print_failure(options, name, one, found)
                continue
            found = replace(found, name=name)
            if name == _EXACT:
                exact = found
            if one.mesh is None:
                alone[name, found.batch] = found
            _print_found(options, one, found, exact, alone.get((name, found.batch)))
            packages = (f"{package} {number}" for package, number in found.versions.items())
            devices[f"{found.device}; {', '.join(packages)}"] = None
    if not options.json:
        print("\n" + "\n".join(devices))


def _print_head(options: argparse.Namespace, case: Case, unit: str) -> None:
    config = case.config
    if options.json:
        chosen = {name: value for name, value in vars(options).items() if name != "run"}
        print_json({"settings": chosen, "config": config.to_hf()})
        return
    name = options.shape or options.model or "the model that ships with h1bjax"
    print(
        f"{name}, {options.dtype}: {config.num_layers} layers, "
        f"{config.num_heads} heads, {config.num_kv_heads} KV heads of {config.head_dim} channels; "
        f"{options.context} tokens\n"
    )
    columns = ["cache", "batch", unit, "tokens/s", "× exact", "cache bytes", "peak memory"]
    if _has_meshes(options):
        columns = [
            "cache", "mesh", "batch", unit, "tokens/s", "× exact", "× 1 device",
            "cache bytes of all devices", "peak memory of one device",
        ]  # fmt: skip
    _print_line(columns)
    _print_line(["---"] * len(columns))


def _print_failure(options: argparse.Namespace, name: str, case: Case, problem: str) -> None:
    if options.json:
        print_json({"name": name, "batch": case.batch, "mesh": case.mesh, "error": problem})
        return
    batch = "largest" if case.batch is None else str(case.batch)
    if _has_meshes(options):
        _print_line([name, case.mesh or _ONE_DEVICE, batch, problem, "", "", "", "", ""])
    else:
        _print_line([name, batch, problem, "", "", "", ""])


def _print_found(
    options: argparse.Namespace,
    case: Case,
    found: Measured,
    exact: Measured | None,
    alone: Measured | None,
) -> None:
    if options.json:
        print_json(found.to_json())
        return
    has_meshes = _has_meshes(options)
    fastest, slowest = 1e3 * found.fastest, 1e3 * found.slowest
    _print_line(
        [
            found.name,
            *([case.mesh or _ONE_DEVICE] if has_meshes else []),
            f"{found.batch}{' (largest)' if case.batch is None else ''}",
            f"{1e3 * found.seconds:.2f} ({fastest:.2f} to {slowest:.2f})",
            f"{found.tokens_per_second:.0f}",
            _ratio(found, exact),
            *([_ratio(found, alone)] if has_meshes else []),
            human_bytes(found.cache_nbytes),
            "" if found.peak_nbytes is None else human_bytes(found.peak_nbytes),
        ]
    )


def _ratio(found: Measured, other: Measured | None) -> str:
    """How many times as many tokens per second, if there is another."""
    return "" if other is None else f"{found.tokens_per_second / other.tokens_per_second:.2f}"


def _has_meshes(options: argparse.Namespace) -> bool:
    """Whether --mesh was given, which only some subjects take; the table has its columns then."""
    return bool(getattr(options, "mesh", None))


def _print_line(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
