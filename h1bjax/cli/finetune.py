"""`h1bjax finetune`: trains a model on text, from random weights or from a model's."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h1bjax
from h1bjax.cli.options import positive
from h1bjax.cli.processes import add_mesh, join_processes

if TYPE_CHECKING:
    from types import ModuleType


def add_parser(commands: Any) -> None:
    """Adds the command to those of the program."""
    parser = commands.add_parser(
        "finetune",
        help="train on text, from random weights or from a model's",
        description="Trains a model on text, from random weights or from a model's; with --cache, "
        "to read that cache. The folder of the job gets the trained model, with its calibration, "
        "and a record of the training. The same command goes on with a job that was interrupted.",
    )
    parser.set_defaults(run=_run)
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument(
        "--init", type=Path, metavar="CONFIG", help="a config.json, to begin with random weights"
    )
    begin.add_argument(
        "--model", metavar="DIR_OR_ID", help="a folder in Hugging Face layout, or a hub id"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer, with --init"
    )
    _add_student(parser)
    _add_files(parser, "--text", "to train on: .txt or .jsonl, or compressed", required=True)
    _add_files(parser, "--valid", "to evaluate the trained model on")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="a new or empty folder, or that of the same job to continue it",
    )
    parser.add_argument(
        "--steps", type=positive, required=True, metavar="N", help="optimizer steps"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=32,
        metavar="N",
        help="sequences in a step; default: %(default)s",
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of a sequence; default: the longest that the model is made for",
    )
    parser.add_argument(
        "--microbatches",
        type=positive,
        default=1,
        metavar="N",
        help="parts that a batch is computed in, to need less memory; default: %(default)s",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="its peak, where weights train; default: 1e-3 with --init and for lora, otherwise "
        "1e-4",
    )
    parser.add_argument(
        "--codec-rate",
        type=float,
        metavar="RATE",
        help="that of the key codec, where the cache has one, as a fraction of the size of its "
        "arrays; default: 0.03 for temperatures, otherwise 0.003",
    )
    parser.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        help="steps in which the learning rate rises; default: one in twenty",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        default=0.1,
        metavar="W",
        help="of matrices; default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the arithmetic; weights are trained in float32; default: %(default)s",
    )
    parser.add_argument(
        "--no-remat",
        dest="remat",
        action="store_false",
        help="keep all results for the backward pass: faster, and needs more memory",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of random weights and of the order of the text; default: %(default)s",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=positive,
        default=500,
        metavar="N",
        help="steps between checkpoints; default: %(default)s",
    )
    add_mesh(parser)


def _add_student(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        metavar="PRESET",
        help="train the model to read this cache; default: train the plain model",
    )
    parser.add_argument(
        "--train",
        dest="trained",
        choices=("temperatures", "decoders", "lora", "everything"),
        default="everything",
        help="what changes: temperatures and offsets of the scores; these and the decoders of the "
        "keys; these and low-rank changes of all matrices; all weights; default: %(default)s",
    )
    parser.add_argument(
        "--rank", type=positive, metavar="N", help="of the changes of lora; default: 16"
    )
    parser.add_argument(
        "--next-token",
        type=float,
        default=1.0,
        metavar="W",
        help="weight of the loss on the next token; default: %(default)s",
    )
    parser.add_argument(
        "--distillation",
        type=float,
        metavar="W",
        help="weight of the divergence from the teacher, which attends exactly; default: 1 with "
        "--teacher or a --cache other than exact, otherwise 0",
    )
    parser.add_argument(
        "--teacher",
        metavar="DIR_OR_ID",
        help="a model of the same shape and tokenizer; default: the model before training",
    )


def _add_files(
    parser: argparse.ArgumentParser, name: str, help: str, required: bool = False
) -> None:
    parser.add_argument(
        name, nargs="+", type=Path, default=[], required=required, metavar="FILE", help=help
    )


def _run(options: argparse.Namespace) -> None:
    if (options.init is None) != (options.tokenizer is None):
        raise ValueError("--tokenizer belongs to --init, and to it alone")
    check_train_package()
    job = _import_job()
    chosen = {field.name: getattr(options, field.name) for field in fields(job.Job)}
    chosen |= {"text": tuple(options.text), "valid": tuple(options.valid)}
    described = job.Job(**chosen)
    join_processes(options)
    outcome = job.run(described)
    print(f"model           {outcome.model}")
    if outcome.loss is not None:
        print(f"training loss   {outcome.loss:.6f}")
    for name, evaluation in outcome.evaluations.items():
        print(f"cache           {name}")
        print(f"nats per token  {evaluation.nats_per_token:.6f}")
        print(f"bits per byte   {evaluation.bits_per_byte:.6f}")


def check_train_package() -> None:
    """Checks, without running it, that `import train` finds the package beside this one.

    Raises:
        ValueError: it finds something else, such as a train.py in the working directory.
    """
    expected = Path(h1bjax.__file__).resolve().parents[1] / "train" / "__init__.py"
    if not expected.is_file():
        raise ValueError(f"the package 'train' is not installed beside h1bjax: no {expected}")
    spec = find_spec("train")
    found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if found != expected:
        raise ValueError(
            f"{found or 'another package train'} hides the package 'train' of h1bjax; rename it, "
            "or run the command from another folder"
        )


def _import_job() -> ModuleType:
    try:
        from train import job
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in (
            "optax",
            "orbax",
            "matplotlib",
        ):
            raise
        raise ValueError(
            f"training needs {error.name}: pip install 'h1bjax[train]', or optax, "
            "orbax-checkpoint and matplotlib"
        ) from error
    return job
