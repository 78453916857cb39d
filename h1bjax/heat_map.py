"""Retrieval as a picture: which context lengths and depths a cache still serves."""

from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from h1bjax.retrieval_grid import RetrievalGrid, RetrievalScores

# Perceived brightness rises evenly, and does so in grey as well.
_COLOURS = "cividis"
_COLUMNS = 5
"""The most caches beside each other; more are spread over several rows."""


def draw_heat_map(
    grid: RetrievalGrid, scores: Sequence[RetrievalScores], path: str | PathLike[str]
) -> None:
    """Draws a column for each cache into a PNG file.

    Above, the share of passkeys that were found, by context length to the right and by depth
    downwards; below it, the share of right tokens in the answers of the key-value lines.

    Args:
        grid: the tasks.
        scores: of each cache.
        path: the file.
    """
    rows = -(-len(scores) // _COLUMNS)
    columns = -(-len(scores) // rows)
    width = max(2.6, 0.62 * len(grid.contexts) + 0.6)
    height = 0.42 * len(grid.depths) + 1.9
    figure = Figure(
        figsize=(width * columns + 1.6, height * rows + 0.6), dpi=150, layout="constrained"
    )
    panels = figure.subplots(
        2 * rows,
        columns,
        squeeze=False,
        gridspec_kw={"height_ratios": [len(grid.depths), 1.3] * rows},
    )
    norm = Normalize(0, 1)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        above, below = panels[2 * row, column], panels[2 * row + 1, column]
        if index >= len(scores):
            above.set_axis_off()
            below.set_axis_off()
            continue
        score = scores[index]
        found = np.array([one.found for one in score.passkeys]).T
        right = np.array([[one.accuracy for one in score.key_values]])
        _cells(above, found, norm)
        _cells(below, right, norm)
        above.set_title(f"{score.preset}\n{_bytes(score)}", fontsize=9)
        above.set_xticks([])
        below.set_xticks(range(len(grid.contexts)), [f"{context:,}" for context in grid.contexts])
        below.tick_params(axis="x", labelrotation=45 if len(grid.contexts) > 3 else 0)
        above.set_yticks([])
        below.set_yticks([])
        if column == 0:
            above.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
            above.set_ylabel("passkey at depth")
            below.set_yticks([0], ["key-value"])
    figure.supxlabel("tokens of context", fontsize=9)
    bar = figure.colorbar(
        ScalarMappable(norm, _COLOURS), ax=panels, shrink=0.7, pad=0.02, aspect=30
    )
    bar.set_label("share found")
    figure.savefig(path, format="png")


def _bytes(score: RetrievalScores) -> str:
    return f"{score.bytes_per_token} bytes per token and head"


def _cells(axes: Axes, values: np.ndarray, norm: Normalize) -> None:
    axes.imshow(values, cmap=_COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        # Dark on bright and bright on dark.
        colour = "black" if value > 0.6 else "white"
        axes.text(
            column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8
        )
    # Lines between the cells, so that equal neighbours can be counted.
    axes.set_xticks(np.arange(0.5, values.shape[1] - 1), minor=True)
    axes.set_yticks(np.arange(0.5, values.shape[0] - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(which="both", length=0)
