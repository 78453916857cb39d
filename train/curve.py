"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from train.log import LogRow


def draw_curve(rows: Sequence[LogRow], path: Path) -> None:
    """Draws the loss over the steps into a PNG file."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row.step for row in rows], [row.loss for row in rows], linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
