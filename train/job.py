"""A training job from its options to an exported model, which can be interrupted at any time."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Array

from h1bjax.checkpoint import load_parameters, save_pretrained
from h1bjax.decoder import Decoder
from h1bjax.evaluate import Perplexity, perplexity
from h1bjax.model import Model
from h1bjax.text_files import read_documents
from train.checkpoint import Checkpoints
from train.curve import draw_curve
from train.data import PackedText, pack
from train.folder import JobFolder
from train.log import read_log
from train.loop import train
from train.options import Job
from train.plan import Plan


@dataclass(frozen=True)
class Outcome:
    """What a job came to.

    Attributes:
        model: the folder of the trained model.
        loss: nats per token of the last steps; None where the log is gone.
        evaluation: on the validation text, None where there is none.
    """

    model: Path
    loss: float | None
    evaluation: Perplexity | None


def run(job: Job) -> Outcome:
    """Runs a job, or the rest of it.

    Raises:
        FileNotFoundError: files or folders are missing.
        ValueError: options, files or the job's folder do not fit; nothing has been written then.
        FloatingPointError: the loss or the gradient is not finite.
    """
    plan = Plan.create(job)
    folder = JobFolder(job.out)
    settings = plan.settings()
    folder.check(settings)
    # Whatever is wrong with the validation text should be known before training.
    valid = read_documents(job.valid) if job.valid else []
    if not folder.model.is_dir():
        text = PackedText(
            pack(
                read_documents(job.text),
                plan.tokenizer,
                vocab_size=plan.config.vocab_size,
                end=plan.end,
            ),
            plan.context,
        )
        folder.claim(settings)
        with Checkpoints(folder.checkpoints) as checkpoints:
            state = train(plan, text, folder, checkpoints)
        draw_curve(read_log(folder.log), folder.curve)
        _export(folder, plan, state.parameters)
    rows = read_log(folder.log)
    evaluation = _evaluate(folder, plan, valid) if valid else None
    return Outcome(folder.model, rows[-1].loss if rows else None, evaluation)


def _export(folder: JobFolder, plan: Plan, parameters: Mapping[str, Array]) -> None:
    partial_model = folder.path / "model.partial"
    if partial_model.exists():
        shutil.rmtree(partial_model)
    narrow = {name: array.astype(plan.config.dtype) for name, array in parameters.items()}
    save_pretrained(partial_model, plan.config, narrow, source=plan.source)
    partial_model.rename(folder.model)


def _evaluate(folder: JobFolder, plan: Plan, documents: list[str]) -> Perplexity:
    parameters = load_parameters(folder.model, plan.config, plan.config.dtype)
    model = Model(Decoder(plan.config, parameters), plan.tokenizer)
    size = plan.job.batch // plan.job.microbatches
    result = perplexity(model, documents, context=plan.context, batch=size)
    figures = {
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "context": plan.context,
    }
    folder.evaluation.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return result
