"""Runs tasks of lm-evaluation-harness with a loaded model."""

import math
from collections.abc import Mapping
from typing import Any

# First, because it says what to install where the harness is not.
from h1bjax.harness.model import HarnessModel  # isort: skip

import datasets
import lm_eval

from h1bjax.harness.tasks import Chosen
from h1bjax.model import Model

SHOWN = ("results", "groups", "n-samples", "n-shot", "versions", "config", "lm_eval_version")
"""What of the harness's report is kept, as far as it has it."""


def run_tasks(
    model: Model,
    chosen: Chosen,
    *,
    run_generated_code: bool = False,
    batch: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores a model on tasks, through its cache.

    Args:
        model: with a tokenizer.
        chosen: see `h1bjax.harness.tasks`.
        run_generated_code: whether tasks may run what the model writes.
        batch: rows at a time. It changes speed and memory, not the result.
        max_length: the most tokens that are read; None takes what the model is made for.
        limit: takes only so many questions of each task.
        shots: solved examples before each question; None takes the tasks' own number, or 0.
        chat: whether the model's chat template is applied.
        generation: arguments that take the place of the tasks' own.
        seed: of sampling.

    Returns:
        The harness's report in plain numbers: "results" by task and "metric,filter", "n-samples",
        "config" and the other entries of `SHOWN`. What has no value is None.

    Raises:
        ValueError: an argument is not valid, or a task wants to run code and may not.
    """
    harness_model = HarnessModel(model, batch_size=batch, max_length=max_length, seed=seed)
    report = lm_eval.simple_evaluate(
        model=harness_model,
        tasks=chosen.tasks,
        task_manager=chosen.manager,
        num_fewshot=shots,
        limit=limit,
        batch_size=batch,
        apply_chat_template=chat,
        gen_kwargs=None if generation is None else dict(generation),
        confirm_run_unsafe_code=run_generated_code,
        log_samples=False,
    )
    assert report is not None, "this is the only process"
    return {name: _plain(report[name]) for name in SHOWN if name in report}


def quieten() -> None:
    """Turns off the progress bars of the harness's library of data sets."""
    datasets.disable_progress_bars()


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int | None):
        return None if value == "N/A" else value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
