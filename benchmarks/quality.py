r"""The quality study: every cache preset on real text, without and with a calibration.

    python benchmarks/quality.py --model DIR --calibration-text train.jsonl.xz \
        --books valid.jsonl.xz --wikitext wikitext.txt --out results.json

scores, for each preset, held-out books and WikiText (bits per byte, also late in the context) and
two long-range retrieval scores, through the cache as decoding reads it: once without a
calibration, where the preset can do without, and once for each calibration seed. The results are
written after every preset; `--table results.json` prints them again as Markdown.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array
from quality_results import EXACT, markdown
from quality_tasks import Tasks, describe, write_results

from h1bjax import PRESETS, CacheSpec, Decoder, load
from h1bjax.cache import CodecParameters
from h1bjax.calibrate import Calibration, calibrate, calibration_windows
from h1bjax.calibration_file import is_calibratable, needs_calibration
from h1bjax.decoder import fold_value_rotation
from h1bjax.model import Model, random_projections
from h1bjax.text_files import read_documents

FILES = ("model", "calibration_text", "books", "wikitext", "out")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, or prints an earlier one."""
    options = _parse(arguments)
    if options.table is not None:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    results = study(options)
    print(markdown(results))


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the study and returns what it also writes to `options.out`.

    Raises:
        ValueError: an option or a file is not good, or results are there already.
        FileNotFoundError: a file is missing.
    """
    if options.out.exists():
        raise ValueError(f"{options.out} exists; the study overwrites nothing")
    names = [EXACT, *(name for name in dict.fromkeys(options.cache) if name != EXACT)]
    specs = [CacheSpec.preset(name) for name in names]
    texts = {
        name: read_documents(getattr(options, name))
        for name in ("calibration_text", "books", "wikitext")
    }
    dtype = None if options.dtype == "auto" else options.dtype
    model = load(options.model, cache=EXACT, dtype=dtype)
    for spec in specs:
        spec.check_head_dim(model.config.head_dim)
    tasks = Tasks.create(
        model,
        books=texts["books"],
        wikitext=texts["wikitext"],
        books_tokens=options.books_tokens,
        wikitext_tokens=options.wikitext_tokens,
        retrieval_windows=options.retrieval_windows,
        context=options.context,
        batch=options.batch,
    )
    parameters = model.decoder.parameters()
    calibrations, seconds = _calibrate(model, texts["calibration_text"], specs, options)
    results: dict[str, Any] = {
        "settings": {
            name: [str(file) for file in value] if isinstance(value, list) else str(value)
            for name, value in vars(options).items()
            if name in FILES
        }
        | {name: value for name, value in vars(options).items() if name not in (*FILES, "table")},
        "model": {
            "layers": model.config.num_layers,
            "heads": model.config.num_heads,
            "kv_heads": model.config.num_kv_heads,
            "head_dim": model.config.head_dim,
            "parameters": sum(array.size for array in parameters.values()),
            "dtype": str(model.decoder.dtype),
        },
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
        | {"python": platform.python_version()},
        "calibration_seconds": seconds,
        "presets": [],
    }
    caches = [
        _caches(model, spec, {seed: made[index] for seed, made in calibrations.items()})
        for index, spec in enumerate(specs)
    ]
    # Compiling takes longer than scoring, and one core for each preset.
    pool = ThreadPoolExecutor(options.compilers)
    try:
        compiled = [
            pool.submit(lambda found: tasks.compile(found[0].decoder(model, parameters)), found)
            for found in caches
        ]
        for spec, found, ready in zip(specs, caches, compiled, strict=True):
            ready.result()
            runs = [_run(tasks, cache, cache.decoder(model, parameters)) for cache in found]
            described = describe(model.config, spec, options.context)
            results["presets"].append(described | {"runs": runs})
            write_results(options.out, results)
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _calibrate(
    model: Model,
    documents: Sequence[str],
    specs: Sequence[CacheSpec],
    options: argparse.Namespace,
) -> tuple[dict[int, list[Calibration | None]], dict[int, float]]:
    """For each seed a calibration of each spec, None where there is nothing to calibrate.

    Also the seconds that each seed took for all specs together.
    """
    wanted = [spec for spec in specs if is_calibratable(spec)]
    calibrations, seconds = {}, {}
    assert model.tokenizer is not None
    for seed in options.seeds if wanted else ():
        begin = time.perf_counter()
        windows = calibration_windows(
            model.tokenizer,
            documents,
            context=options.context,
            tokens=options.calibration_tokens,
            seed=seed,
        )
        made = calibrate(model.decoder, windows, wanted, seed=seed)
        jax.block_until_ready([(one.codec, one.rotation) for one in made])
        by_spec = dict(zip(wanted, made, strict=True))
        calibrations[seed] = [by_spec.get(spec) for spec in specs]
        seconds[seed] = round(time.perf_counter() - begin, 1)
        print(f"calibrated {len(wanted)} presets, seed {seed}: {seconds[seed]} s", file=sys.stderr)
    return calibrations, seconds


@dataclass(frozen=True)
class _Cache:
    """A cache with its parameters; `seed` is that of its calibration, None without one."""

    spec: CacheSpec
    codec: CodecParameters | None
    rotation: Array | None
    seed: int | None

    def decoder(self, model: Model, parameters: Mapping[str, Array]) -> Decoder:
        if self.rotation is not None:
            parameters = fold_value_rotation(model.config, parameters, self.rotation)
        return Decoder(model.config, parameters, self.spec, self.codec)


def _caches(
    model: Model, spec: CacheSpec, calibrations: Mapping[int, Calibration | None]
) -> list[_Cache]:
    """A preset without a calibration, if it can do without, and with each there is."""
    caches = []
    if not needs_calibration(spec):
        codec, rotation = random_projections(model.config, spec, seed=0)
        caches.append(_Cache(spec, codec, rotation, None))
    for seed, made in calibrations.items():
        if made is not None:
            caches.append(_Cache(spec, made.codec, made.rotation, seed))
    return caches


def _run(tasks: Tasks, cache: _Cache, decoder: Decoder) -> dict[str, Any]:
    begin = time.perf_counter()
    scores = tasks.score(decoder)
    seconds = round(time.perf_counter() - begin, 2)
    kind = "no calibration" if cache.seed is None else f"calibration seed {cache.seed}"
    print(
        f"{cache.spec.name}, {kind}: books {scores['books']['bits_per_byte']:.4f}, "
        f"copy {scores['copy']['bits_per_byte']:.4f} bits per byte, {seconds} s",
        file=sys.stderr,
        flush=True,
    )
    return {"calibration_seed": cache.seed, "scores": scores, "seconds": seconds}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a folder, or a hub id")
    for name, help in {
        "calibration-text": "text to calibrate with, .txt or .jsonl, also compressed",
        "books": "held-out text, from which the passages to copy are taken too",
        "wikitext": "held-out text of another kind",
    }.items():
        parser.add_argument(f"--{name}", nargs="+", metavar="FILE", help=help)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument(
        "--cache",
        nargs="+",
        default=list(PRESETS),
        metavar="PRESET",
        help="which presets, besides exact; default: all",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="of the calibrations; default: 0 1 2",
    )
    for name, default in {
        "context": 2048,
        "calibration-tokens": 262144,
        "books-tokens": 262144,
        "wikitext-tokens": 262144,
        "retrieval-windows": 64,
        "batch": 32,
        "compilers": 4,
    }.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s"
        )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="only print these results, as Markdown"
    )
    options = parser.parse_args(arguments)
    missing = [name for name in FILES if getattr(options, name) is None]
    if options.table is None and missing:
        parser.error("give " + ", ".join(f"--{name.replace('_', '-')}" for name in missing))
    return options


if __name__ == "__main__":
    main()
