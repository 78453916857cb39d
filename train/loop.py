"""The training loop."""

import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Float64
from tqdm import tqdm

from train.checkpoint import Checkpoints
from train.data import PackedText
from train.folder import JobFolder
from train.log import LogRow, append_log, read_log, write_log
from train.plan import Plan
from train.processes import is_first
from train.step import (
    Metrics,
    Recipe,
    TrainState,
    codec_rate,
    initial_state,
    learning_rate,
    train_step,
)
from train.student import fixed_arrays, trained_arrays

LOG_EVERY = 10
"""Steps between two rows of the log, for which the host waits for the device."""


def train(plan: Plan, text: PackedText, folder: JobFolder, checkpoints: Checkpoints) -> TrainState:
    """Takes the steps that are left, from the newest sound checkpoint on, and saves the last state.

    Args:
        plan: the job.
        text: to train on.
        folder: gets the log.
        checkpoints: of this job.

    Raises:
        FloatingPointError: a loss or the gradient is not finite. The state from which that came
            may have been saved; the states after it are not.
        OSError: a checkpoint cannot be saved. Those before it are kept.
        ValueError: a checkpoint is not damaged, and cannot be restored.
    """
    job, recipe = plan.job, plan.job.recipe
    origin, scope, placement = plan.origin(), recipe.scope, plan.placement
    teaches = recipe.distillation > 0
    rate = learning_rate if scope.trains_weights else codec_rate
    taught_by = plan.teacher_weights(origin) if teaches else None
    fixed = placement.place(fixed_arrays(scope, origin, recipe.dtype, taught_by=taught_by))
    trained = placement.place(trained_arrays(plan.config, scope, origin, jax.random.key(job.seed)))
    # The first step consumes the arrays that train, which may be those of the origin.
    del origin, taught_by
    shapes = jax.eval_shape(lambda: initial_state(trained, recipe))
    places = placement.of_tree(shapes)
    state = checkpoints.restore(shapes, places)
    if state is None:
        begin_from = partial(initial_state, recipe=recipe)
        state = jax.jit(begin_from, out_shardings=places, donate_argnums=0)(trained)
    del trained
    begin = int(state.step)
    if is_first():
        # Steps after the checkpoint are taken, and recorded, again.
        write_log(folder.log, [row for row in read_log(folder.log) if row.step <= begin])

    unread: list[Metrics] = []
    clock, timed = time.perf_counter(), 0
    # None shows the bar on a terminal only.
    silent = None if is_first() else True
    with tqdm(
        total=job.steps, initial=begin, desc="Training", unit="step", disable=silent
    ) as progress:
        for step in range(begin, job.steps):
            batch = placement.place_rows(text.batch(job.seed, step, job.batch))
            state, metrics = train_step(state, fixed, batch, plan.config, recipe)
            unread.append(metrics)
            timed += 1
            if step == begin:
                # Compiling is not counted as training.
                jax.block_until_ready(metrics)
                clock, timed = time.perf_counter(), 0
            done = step + 1
            saves = done % job.checkpoint_every == 0 or done == job.steps
            if not saves and done % LOG_EVERY:
                continue
            numbers = _numbers(unread)
            if not np.isfinite(numbers).all():
                # Until the save in progress ends, it is not known which checkpoint is kept.
                checkpoints.finish()
                raise FloatingPointError(_not_finite(recipe, numbers, done, checkpoints.latest))
            loss, divergence, _ = numbers.mean(axis=0).tolist()
            seconds = time.perf_counter() - clock
            speed = timed * job.batch * plan.context / seconds if timed else None
            row = LogRow(
                done,
                loss,
                divergence if teaches else None,
                float(rate(recipe, step)),
                speed,
            )
            if is_first():
                append_log(folder.log, row)
            progress.update(len(unread))
            shown = {} if speed is None else {"tokens/s": f"{speed:.0f}"}
            progress.set_postfix(loss=f"{loss:.4f}", **shown)
            unread = []
            if saves:
                checkpoints.save(state)
            else:
                checkpoints.list_finished()
            clock, timed = time.perf_counter(), 0
    return state


def _numbers(unread: Sequence[Metrics]) -> Float64[np.ndarray, "steps 3"]:
    """Loss on the next token, divergence and gradient norm of each step."""
    read = [
        (metrics.losses.next_token, metrics.losses.divergence, metrics.gradient_norm)
        for metrics in jax.device_get(unread)
    ]
    return np.array(read, np.float64)


def _not_finite(
    recipe: Recipe, numbers: Float64[np.ndarray, "steps 3"], done: int, saved: int | None
) -> str:
    """Says at which step a number is not finite, and what can be done."""
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))[0]
    loss, divergence, norm = numbers[bad]
    kept = "there is no checkpoint yet" if saved is None else f"step {saved} is kept"
    rate = "learning rate" if recipe.scope.trains_weights else "codec rate"
    return (
        f"step {done - len(numbers) + 1 + bad} has loss {loss}, divergence {divergence} and "
        f"gradient norm {norm}; {kept}. The same job would probably come to this again: begin "
        f"another, in another folder, with a smaller {rate} or a longer warmup"
    )
