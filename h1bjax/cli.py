"""The command line: `h1bjax generate`, `eval perplexity`, `cache-size` and `convert`.

Only argparse is imported before the arguments are known to be good, so that help and mistakes
answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from h1bjax.cache import KVCache
    from h1bjax.config import LlamaConfig
    from h1bjax.model import Model

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
    # JAX reports a missing device or exhausted memory as a RuntimeError.
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        _report(f"error: {error}" if str(error) else f"error: {type(error).__name__}")
        return EXIT_ERROR
    return 0


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing usage, and takes no abbreviated options."""

    def __init__(self, **keywords: Any):
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="Llama-family decoding in JAX from a compressed key-value cache."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    evaluate = commands.add_parser("eval", help="measure a model's quality")
    _add_perplexity(evaluate.add_subparsers(title="measures", metavar="MEASURE", required=True))
    _add_cache_size(commands)
    _add_convert(commands)
    return parser


def _version() -> str:
    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        return "(a source tree that is not installed)"


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue prompts")
    parser.set_defaults(run=_generate)
    _add_model(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        dest="prompts",
        help="text to continue; repeat it to continue several at once",
    )
    _add_cache(parser)
    _add_dtype(parser)
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="default: %(default)s"
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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
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
    _add_json(parser, "print one JSON object")


def _add_perplexity(measures: Any) -> None:
    parser = measures.add_parser("perplexity", help="score a text through the cache")
    parser.set_defaults(run=_perplexity)
    _add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text file")
    _add_cache(parser)
    _add_dtype(parser)
    parser.add_argument(
        "--context",
        type=_positive,
        required=True,
        metavar="N",
        help="tokens of the windows that the text is cut into",
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        default=8,
        metavar="N",
        help="windows at a time; default: %(default)s",
    )
    _add_json(parser, "print one JSON object")


def _add_cache_size(commands: Any) -> None:
    parser = commands.add_parser(
        "cache-size", help="what each cache preset costs; needs only config.json"
    )
    parser.set_defaults(run=_cache_size)
    _add_model(parser)
    parser.add_argument(
        "--context", type=_positive, required=True, metavar="N", help="tokens of each sequence"
    )
    parser.add_argument(
        "--batch", type=_positive, default=1, metavar="N", help="sequences; default: %(default)s"
    )
    _add_json(parser, "print a JSON list")


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert", help="write a checkpoint as a folder of safetensors, in another dtype if wanted"
    )
    parser.set_defaults(run=_convert)
    _add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    _add_dtype(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="a folder in Hugging Face layout, or a hub id",
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        default="h1b",
        metavar="PRESET",
        help="cache preset, of which cache-size lists all; default: %(default)s",
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of weights and arithmetic; auto, the default, is the checkpoint's",
    )


def _add_json(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--json", action="store_true", help=help)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _generate(options: argparse.Namespace) -> None:
    if options.stream and options.json:
        raise ValueError("--stream prints text as it comes and --json one object: choose one")
    if options.stream and len(options.prompts) > 1:
        raise ValueError(f"--stream takes one prompt, not {len(options.prompts)}")
    from h1bjax.sampling import Sampling

    # Loading may take minutes, so what can be checked without a model is checked before.
    Sampling.create(options.temperature, options.top_k, options.top_p, options.min_p)
    model = _load(options)
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
        _stream(model, options.prompts[0], chosen)
        return
    out = model.generate(options.prompts, **chosen)
    assert out.text is not None
    if options.json:
        _print_json(
            {
                "text": out.text,
                "tokens": out.tokens,
                "cache": _cache_report(model, out.cache),
                "tokens_per_second": out.tokens_per_second,
            }
        )
        return
    for index, (prompt, text) in enumerate(zip(options.prompts, out.text, strict=True)):
        if len(options.prompts) > 1:
            print(f"{'' if index == 0 else chr(10)}==> prompt {index + 1} <==")
        print(prompt + text)
    sys.stdout.flush()
    _print_summary(model, out.cache, sum(map(len, out.tokens)), out.tokens_per_second)


def _stream(model: Model, prompt: str, chosen: dict[str, Any]) -> None:
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
    _print_summary(model, step.cache, count, speed)


def _perplexity(options: argparse.Namespace) -> None:
    # As it stands in the file: universal newlines would change the bytes that are counted.
    data = Path(options.text).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.text} is not UTF-8 text: {error}") from error
    from h1bjax.evaluate import perplexity

    model = _load(options)
    result = perplexity(model, text, context=options.context, batch=options.batch)
    if options.json:
        _print_json(
            {
                "nats_per_token": result.nats_per_token,
                "bits_per_byte": result.bits_per_byte,
                "tokens": result.tokens,
                "cache": _cache_report(model, result.cache),
            }
        )
        return
    print(f"nats per token  {result.nats_per_token:.6f}")
    print(f"bits per byte   {result.bits_per_byte:.6f}")
    print(f"perplexity      {result.perplexity:.4f}")
    print(f"tokens          {result.tokens}")
    print(f"bytes           {result.bytes}")
    sys.stdout.flush()
    _print_cache(_cache_report(model, result.cache))


def _cache_size(options: argparse.Namespace) -> None:
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
    sizes = {
        name: spec.nbytes(config, batch=options.batch, max_length=options.context)
        for name, spec in PRESETS.items()
    }
    rows = [
        {
            "preset": name,
            "bytes_per_token_head": PRESETS[name].bytes_per_token(config.head_dim),
            "nbytes": nbytes,
            "ratio": sizes["exact"] / nbytes,
        }
        for name, nbytes in sizes.items()
    ]
    if options.json:
        _print_json(rows)
        return
    _print_sizes(config, rows, options.context, options.batch)


def _convert(options: argparse.Namespace) -> None:
    from h1bjax.checkpoint import (
        check_destination,
        load_parameters,
        resolve_model,
        save_pretrained,
    )
    from h1bjax.config import LlamaConfig

    out = Path(options.out)
    check_destination(out)
    source = resolve_model(options.model)
    config = LlamaConfig.from_hf(source)
    dtype = config.dtype if options.dtype == "auto" else options.dtype
    parameters = load_parameters(source, config, dtype)
    save_pretrained(out, config, parameters, source=source)
    count = sum(array.size for array in parameters.values())
    print(f"{out}: {config.model_type}, {count} parameters in {dtype}")


def _load(options: argparse.Namespace) -> Model:
    from h1bjax.model import load

    dtype = None if options.dtype == "auto" else options.dtype
    return load(options.model, cache=options.cache, dtype=dtype)


def _cache_report(model: Model, cache: KVCache) -> dict[str, Any]:
    """What a cache costs, and what a bf16 cache of the same batch and capacity would."""
    from h1bjax.cache import CacheSpec

    exact = CacheSpec.preset("exact")
    return {
        "preset": cache.spec.name,
        "nbytes": cache.nbytes,
        "bf16_nbytes": exact.nbytes(model.config, batch=cache.batch, max_length=cache.capacity),
    }


def _print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False))


def _print_summary(model: Model, cache: KVCache, tokens: int, speed: float | None) -> None:
    decoded = f"{tokens} new tokens" if speed is None else f"{speed:.1f} tokens/s"
    _print_cache(_cache_report(model, cache), decoded)


def _print_cache(report: dict[str, Any], *more: str) -> None:
    size, bf16 = report["nbytes"], report["bf16_nbytes"]
    parts = [f"{_bytes(size)}, in bf16 {_bytes(bf16)} ({bf16 / size:.2f} times as much)", *more]
    print(f"cache {report['preset']}: {'; '.join(parts)}", file=sys.stderr)


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
                _bytes(row["nbytes"]),
                f"{row['ratio']:.2f}",
            )
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells))


def _bytes(count: int) -> str:
    """A number of bytes in decimal units."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


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


if __name__ == "__main__":
    sys.exit(main())
