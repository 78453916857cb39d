"""A training job from its options to an exported model, which can be interrupted at any time."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from jaxtyping import Array

from h1bjax.cache import CacheSpec
from h1bjax.calibrate import Calibration
from h1bjax.calibration_file import CalibrationText, is_calibratable, save_calibration
from h1bjax.checkpoint import save_pretrained
from h1bjax.evaluate import Perplexity, perplexity
from h1bjax.fingerprint import file_sha256
from h1bjax.model import load
from h1bjax.sharding import to_host
from h1bjax.text_files import read_documents
from train.checkpoint import Checkpoints
from train.curve import draw_curve
from train.data import PackedText, pack
from train.folder import JobFolder
from train.log import read_log
from train.loop import train
from train.options import Job
from train.plan import Plan
from train.processes import is_first, wait_for_all
from train.student import fixed_codec, merged_codec, merged_weights

EXACT = CacheSpec.preset("exact")


@dataclass(frozen=True)
class Outcome:
    """What a job came to.

    Attributes:
        model: the folder of the trained model.
        loss: nats per token of the last steps; None where the log is gone.
        evaluations: on the validation text, by the name of the cache: the exact one, and the one
            that was trained for. Empty where there is no such text.
    """

    model: Path
    loss: float | None
    evaluations: Mapping[str, Perplexity]


def run(job: Job) -> Outcome:
    """Runs a job, or the rest of it.

    Raises:
        FileNotFoundError: files or folders are missing.
        ValueError: options, files or the job's folder do not fit; nothing has been written then.
        FloatingPointError: a loss or the gradient is not finite.
        OSError: something cannot be written. What was saved before is kept.
    """
    plan = Plan.create(job)
    folder = JobFolder(job.out)
    settings = plan.settings()
    folder.check(settings)
    # Whatever is wrong with the validation text should be known before training.
    valid = read_documents(job.valid) if job.valid else []
    wait_for_all("all have checked the folder")
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
        if is_first():
            folder.claim(settings)
        wait_for_all("the folder is this job's")
        with Checkpoints(folder.checkpoints) as checkpoints:
            state = train(plan, text, folder, checkpoints)
        if is_first():
            draw_curve(read_log(folder.log), folder.curve)
        _export(folder, plan, text, state.parameters)
        wait_for_all("the model is whole")
    rows = read_log(folder.log)
    evaluations = _evaluate(folder, plan, valid) if valid else {}
    return Outcome(folder.model, rows[-1].loss if rows else None, evaluations)


def _export(folder: JobFolder, plan: Plan, text: PackedText, trained: Mapping[str, Array]) -> None:
    """Writes the model, and beside its weights the calibration of the cache it was trained for."""
    scope, origin = plan.job.scope, plan.origin()
    weights = merged_weights(plan.config, scope, trained, origin.weights)
    narrow = {name: to_host(array.astype(plan.config.dtype)) for name, array in weights.items()}
    codec = jax.tree.map(to_host, merged_codec(trained, fixed_codec(scope, origin)))
    if not is_first():
        return
    partial_model = folder.path / "model.partial"
    if partial_model.exists():
        shutil.rmtree(partial_model)
    save_pretrained(partial_model, plan.config, narrow, source=plan.source)
    if is_calibratable(scope.spec):
        calibration = Calibration(scope.spec, codec, origin.rotation)
        save_calibration(partial_model, calibration, _described(plan, text))
    partial_model.rename(folder.model)


def _described(plan: Plan, text: PackedText) -> CalibrationText:
    return CalibrationText(
        files={path.name: file_sha256(path) for path in plan.job.text},
        tokens=len(text.stream),
        tokens_sha256=hashlib.sha256(text.stream.astype("<i4").tobytes()).hexdigest(),
        context=plan.context,
        seed=plan.job.seed,
    )


def _evaluate(folder: JobFolder, plan: Plan, documents: list[str]) -> dict[str, Perplexity]:
    size = plan.job.batch // plan.job.microbatches
    evaluations = {}
    for spec in dict.fromkeys((EXACT, plan.job.scope.spec)):
        model = load(folder.model, cache=spec, mesh=plan.placement.mesh)
        evaluations[spec.name] = perplexity(model, documents, context=plan.context, batch=size)
    figures = {
        "context": plan.context,
        "caches": {
            name: {
                "nats_per_token": found.nats_per_token,
                "bits_per_byte": found.bits_per_byte,
                "tokens": found.tokens,
                "bytes": found.bytes,
            }
            for name, found in evaluations.items()
        },
    }
    if is_first():
        folder.evaluation.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return evaluations
