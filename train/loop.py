"""The training loop."""

import time
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from train.checkpoint import Checkpoints
from train.data import PackedText
from train.folder import JobFolder
from train.initialise import random_parameters
from train.log import LogRow, append_log, read_log, write_log
from train.plan import Plan
from train.step import Metrics, TrainState, initial_state, learning_rate, train_step

LOG_EVERY = 10
"""Steps between two rows of the log, for which the host waits for the device."""


def train(plan: Plan, text: PackedText, folder: JobFolder, checkpoints: Checkpoints) -> TrainState:
    """Takes the steps that are left, from the newest checkpoint on, and saves the last state.

    Args:
        plan: the job.
        text: to train on.
        folder: gets the log.
        checkpoints: of this job.

    Raises:
        FloatingPointError: the loss or the gradient is not finite. The state from which that
            came is not saved.
    """
    job, recipe = plan.job, plan.job.recipe
    begin = checkpoints.latest or 0
    if begin:
        shapes = jax.eval_shape(
            lambda key: initial_state(random_parameters(plan.config, key), recipe),
            jax.random.key(0),
        )
        state = checkpoints.restore(shapes)
    else:
        state = initial_state(plan.parameters(), recipe)
    # Steps after the checkpoint are taken, and recorded, again.
    write_log(folder.log, [row for row in read_log(folder.log) if row.step <= begin])

    unread: list[Metrics] = []
    clock, timed = time.perf_counter(), 0
    # disable=None shows the bar on a terminal only.
    with tqdm(
        total=job.steps, initial=begin, desc="Training", unit="step", disable=None
    ) as progress:
        for step in range(begin, job.steps):
            batch = text.batch(job.seed, step, job.batch)
            state, metrics = train_step(state, batch, plan.config, recipe)
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
            loss = _mean_loss(unread, done, checkpoints.latest)
            seconds = time.perf_counter() - clock
            speed = timed * job.batch * plan.context / seconds if timed else None
            append_log(folder.log, LogRow(done, loss, float(learning_rate(recipe, step)), speed))
            progress.update(len(unread))
            shown = {} if speed is None else {"tokens/s": f"{speed:.0f}"}
            progress.set_postfix(loss=f"{loss:.4f}", **shown)
            unread = []
            if saves:
                checkpoints.save(state)
            clock, timed = time.perf_counter(), 0
    return state


def _mean_loss(unread: Sequence[Metrics], done: int, saved: int | None) -> float:
    losses = np.array([float(metrics.loss) for metrics in unread])
    norms = np.array([float(metrics.gradient_norm) for metrics in unread])
    bad = np.flatnonzero(~np.isfinite(losses) | ~np.isfinite(norms))
    if bad.size:
        first = bad[0]
        kept = "there is no checkpoint yet" if saved is None else f"step {saved} is kept"
        raise FloatingPointError(
            f"step {done - len(unread) + 1 + first} has loss {losses[first]} and gradient norm "
            f"{norms[first]}; {kept}; a smaller learning rate or a longer warmup may help"
        )
    return float(losses.mean())
