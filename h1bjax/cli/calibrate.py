"""`h1bjax calibrate`: fits caches to a model, and writes them beside its weights."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h1bjax.cli.options import add_dtype, add_model, add_text, positive

if TYPE_CHECKING:
    from h1bjax.cache import CacheSpec
    from h1bjax.config import LlamaConfig

DEFAULT_CONTEXT = 2048


def add_parser(commands: Any) -> None:
    """Adds the command to those of the program."""
    parser = commands.add_parser(
        "calibrate",
        help="fit caches to a model from sample text",
        description="Fits caches to a model in one pass over sample text, and writes the "
        "calibrations beside its weights, where every command finds them.",
    )
    parser.set_defaults(run=_run)
    add_model(parser)
    add_text(parser)
    parser.add_argument(
        "--cache",
        action="append",
        required=True,
        metavar="PRESET",
        dest="caches",
        help="cache preset to fit; repeat it to fit several in one pass",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the model's own folder, one that an earlier calibration of it wrote, or a new or "
        "empty one, which gets a copy of the model",
    )
    add_dtype(parser)
    parser.add_argument(
        "--tokens",
        type=positive,
        default=262144,
        metavar="N",
        help="how much of the text to read; default: %(default)s",
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"tokens of each window; default: {DEFAULT_CONTEXT}, or as many as the model can read",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=4,
        metavar="N",
        help="windows at a time; default: %(default)s",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the choice of text and keys; default: %(default)s",
    )


def _run(options: argparse.Namespace) -> None:
    from h1bjax.calibrate import calibrate, calibration_windows
    from h1bjax.calibration_file import CalibrationText, check_calibrations, save_calibration
    from h1bjax.checkpoint import copy_pretrained, load_parameters, resolve_model
    from h1bjax.config import LlamaConfig
    from h1bjax.decoder import Decoder
    from h1bjax.text_files import read_documents
    from h1bjax.tokenizer import Tokenizer

    # Whatever can be wrong is looked at before the work, the cheapest first.
    specs = _specs(options.caches)
    out = Path(options.out)
    _check_destination(out, specs)
    documents = read_documents(options.text)
    source = resolve_model(options.model)
    config = LlamaConfig.from_hf(source)
    context = _context(options, config, specs)
    for spec in specs:
        spec.check_head_dim(config.head_dim)
    copied = not out.exists() or not any(out.iterdir())
    if not copied:
        _check_same_model(out, source)
        check_calibrations(out)
    tokenizer = Tokenizer.from_pretrained(source)
    windows = calibration_windows(
        tokenizer, documents, context=context, tokens=options.tokens, seed=options.seed
    )
    if windows.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token ids up to {windows.max()}, and the model's vocabulary has "
            f"{config.vocab_size}"
        )
    text = CalibrationText.of(options.text, windows, options.seed)

    begin = time.perf_counter()
    dtype = config.dtype if options.dtype == "auto" else options.dtype
    decoder = Decoder(config, load_parameters(source, config, dtype))
    calibrations = calibrate(decoder, windows, specs, seed=options.seed, batch=options.batch)
    if copied:
        copy_pretrained(source, out)
    for calibration in calibrations:
        path = save_calibration(out, calibration, text)
        seconds = time.perf_counter() - begin
        print(f"{path}: {calibration.spec.name}, {windows.size} tokens, {seconds:.1f} s")


def _specs(names: Sequence[str]) -> list[CacheSpec]:
    from h1bjax.cache import CacheSpec
    from h1bjax.calibration_file import is_calibratable

    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--cache names twice: {', '.join(repeated)}")
    specs = [CacheSpec.preset(name) for name in names]
    if useless := [spec.name for spec in specs if not is_calibratable(spec)]:
        raise ValueError(f"there is nothing to calibrate in the cache {', '.join(useless)}")
    return specs


def _context(options: argparse.Namespace, config: LlamaConfig, specs: Sequence[CacheSpec]) -> int:
    longest = config.max_position_embeddings
    if config.sliding_window is not None:
        longest = min(longest, config.sliding_window)
    context = min(DEFAULT_CONTEXT, longest) if options.context is None else options.context
    if context > longest:
        raise ValueError(f"--context {context} exceeds the {longest} tokens that the model reads")
    if options.tokens < context:
        raise ValueError(f"--tokens {options.tokens} is less than one window of {context}")
    for spec in specs:
        if spec.sketch is not None and context <= spec.exact_tokens:
            raise ValueError(
                f"--context {context} lies within the {spec.exact_tokens} tokens that the cache "
                f"{spec.name!r} keeps exactly"
            )
    return context


def _check_destination(out: Path, specs: Sequence[CacheSpec]) -> None:
    """What can be wrong with --out whatever the model is."""
    from h1bjax.calibration_file import calibration_path

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(f"{out} is neither empty nor a model's folder, and nothing is overwritten")
    paths = [calibration_path(out, spec.name) for spec in specs]
    if existing := [str(path) for path in paths if path.exists()]:
        raise FileExistsError(f"nothing is overwritten, and there is {', '.join(existing)}")
    ancestor = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise PermissionError(f"{out} cannot be written: {ancestor} is no folder or is read-only")


def _check_same_model(out: Path, source: Path) -> None:
    """Raises ValueError if `out` holds another model than `source`."""
    from h1bjax.config import LlamaConfig
    from h1bjax.fingerprint import weights_fingerprint

    if out.resolve() == source.resolve():
        return
    same = LlamaConfig.from_hf(out) == LlamaConfig.from_hf(source)
    if not same or weights_fingerprint(out) != weights_fingerprint(source):
        raise ValueError(
            f"{out} holds another model than {source}, and nothing is overwritten; give a new or "
            "empty folder"
        )
