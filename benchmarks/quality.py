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
import os
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

from h1bjax import PRESETS, CacheSpec, Decoder, load
from h1bjax.cache import CodecParameters
from h1bjax.calibrate import Calibration, calibrate, calibration_windows
from h1bjax.calibration_file import is_calibratable, needs_calibration
from h1bjax.decoder import fold_value_rotation
from h1bjax.evaluate import evaluation_tokenizer, window_perplexity
from h1bjax.model import Model, random_projections
from h1bjax.retrieval import (
    CopyTask,
    KeyValueTask,
    copy_task,
    key_value_task,
    score_copies,
    score_key_values,
)
from h1bjax.text_files import read_documents
from h1bjax.window_scores import score_windows
from h1bjax.windows import Windows, text_windows

FILES = ("model", "calibration_text", "books", "wikitext", "out")


@dataclass(frozen=True)
class Tasks:
    """What every cache is scored on, cut into windows once.

    All have windows of one length and are read in batches of one size, so that one compiled
    function serves all of them.
    """

    books: Windows
    wikitext: Windows
    copies: CopyTask
    key_values: KeyValueTask
    context: int
    batch: int

    def compile(self, decoder: Decoder) -> None:
        """Compiles what `score` needs for decoders of this spec, and runs it once."""
        score_windows(decoder, self.books.first(1), batch=self.batch, length=self.context)

    def score(self, decoder: Decoder) -> dict[str, Any]:
        """Scores a decoder through the cache of its spec."""
        shape = {"batch": self.batch, "length": self.context}
        scores: dict[str, Any] = {}
        for name, windows in [("books", self.books), ("wikitext", self.wikitext)]:
            result = window_perplexity(decoder, windows, **shape)
            scores[name] = {
                "bits_per_byte": result.bits_per_byte,
                "nats_per_token": result.nats_per_token,
                "tokens": result.tokens,
                "bytes": result.bytes,
                "late_bits_per_byte": None if result.late is None else result.late.bits_per_byte,
                "late_tokens": 0 if result.late is None else result.late.tokens,
                "late_bytes": 0 if result.late is None else result.late.bytes,
            }
        copies = score_copies(decoder, self.copies, **shape)
        scores["copy"] = {
            "bits_per_byte": copies.bits_per_byte,
            "first_bits_per_byte": copies.first.bits_per_byte,
            "tokens": copies.repeated.tokens,
            "bytes": copies.repeated.bytes,
        }
        answers = score_key_values(decoder, self.key_values, **shape)
        scores["key_value"] = {
            "bits_per_byte": answers.bits_per_byte,
            "accuracy": answers.accuracy,
            "tokens": answers.answers.tokens,
            "bytes": answers.answers.bytes,
        }
        return scores


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
    tasks = _tasks(model, texts, options)
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
            results["presets"].append(_describe(model, spec, options.context) | {"runs": runs})
            _write(options.out, results)
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _tasks(model: Model, texts: Mapping[str, Sequence[str]], options: argparse.Namespace) -> Tasks:
    context = options.context
    trained = model.config.max_position_embeddings
    if context > trained:
        raise ValueError(f"--context {context} exceeds the {trained} tokens the model is made for")
    tokenizer = evaluation_tokenizer(model, context, options.batch)
    vocab_size = model.config.vocab_size
    counts = {"books": options.books_tokens, "wikitext": options.wikitext_tokens}
    books, wikitext = (
        text_windows(tokenizer, vocab_size, texts[name], context=context, tokens=tokens)
        for name, tokens in counts.items()
    )
    retrieval = {"context": context, "windows": options.retrieval_windows, "seed": 0}
    return Tasks(
        books=books,
        wikitext=wikitext,
        copies=copy_task(tokenizer, vocab_size, texts["books"], **retrieval),
        key_values=key_value_task(tokenizer, vocab_size, **retrieval),
        context=context,
        batch=options.batch,
    )


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


def _describe(model: Model, spec: CacheSpec, context: int) -> dict[str, Any]:
    config = model.config
    nbytes = spec.nbytes(config, batch=1, max_length=context)
    return {
        "name": spec.name,
        "keys": "evicted" if spec.evict else type(spec.keys).__name__,
        "calibratable": is_calibratable(spec),
        "bytes_per_token_head": spec.bytes_per_token(config.head_dim),
        "everything_per_token_head": nbytes / (config.num_layers * config.num_kv_heads * context),
    }


def _write(path: Path, results: Mapping[str, Any]) -> None:
    """Replaces the file at once, so that a killed study leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


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
