"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from train.log import LogRow


def draw_curve(rows: Sequence[LogRow], path: Path) -> None:
    """Draws the losses over the steps into a PNG file."""
    steps = [row.step for row in rows]
    divergences = [row.divergence for row in rows if row.divergence is not None]
    figure = Figure(figsize=(7, 6 if divergences else 4), layout="constrained")
    axes = figure.subplots(2 if divergences else 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(steps, [row.loss for row in rows], linewidth=1)
    axes[0].set_ylabel("loss, nats per token")
    if divergences:
        axes[1].plot(steps[-len(divergences) :], divergences, linewidth=1)
        axes[1].set_ylabel("divergence from the teacher")
        axes[1].set_yscale("log")
    for each in axes:
        each.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(path, format="png", dpi=150)
