r"""Draws what `quality.py` found: loss of quality per byte, for text and for copying.

    python benchmarks/quality_plot.py results.json docs/quality.png

Calibrated presets are shown at the mean of their seeds, with bars from the best to the worst. A
line leads to a hollow marker where the model was trained for the cache, and is compared with the
exact cache of a model that was trained as long.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox
from quality_results import EXACT, Row, rows

PANELS = {"books": "Held-out books", "copy": "Copying a passage from far back"}

FAMILIES = {
    "OrthogonalSigns": ("signs", "#1f77b4", "o"),
    "TwoPlanes": ("two planes of signs", "#8c56c4", "s"),
    "LinearCode": ("transform coding", "#2a8f3a", "D"),
    "GaussianSigns": ("H1B-KV as published", "#d62728", "X"),
    "ChannelQuantisedKeys": ("KIVI", "#e07b00", "^"),
    "evicted": ("sinks + window", "#6b6b6b", "v"),
}
OTHER = ("other", "#a0522d", "P")
"""Label, colour and marker by key codec."""

LINEAR = 1e-3
"""Losses below this are drawn on a linear scale, those above on a logarithmic one."""

NEAR = 12
"""Names farther than so many pixels at 72 dpi from their point are tied to it by a line."""


def draw(results: Mapping[str, Any]) -> Figure:
    """A panel per measure: bytes per token and KV head to the right, loss upwards."""
    found = [row for row in rows(results, calibrated=True) if row.name != EXACT]
    learnt = {}
    if finetuned := results.get("finetuned"):
        learnt = {row.name: row for row in rows(finetuned, calibrated=True) if row.name != EXACT}
    figure = Figure(figsize=(11.5, 6.5), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (column, title) in zip(panels, PANELS.items(), strict=True):
        _points(axes, [row for row in found if column in row.loss], learnt, column)
        axes.set_title(title)
        axes.set_ylabel("bits per byte above the exact cache")
        axes.set_xlabel(
            f"bytes per token and KV head at {results['settings']['context']} tokens, all counted"
        )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    # Labels are placed by their size in pixels, which is known once the layout is.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, column in zip(panels, PANELS, strict=True):
        _label(axes, [row for row in found if column in row.loss], learnt, column)
    return figure


def _points(axes: Axes, shown: Sequence[Row], learnt: Mapping[str, Row], column: str) -> None:
    for keys, group in itertools.groupby(sorted(shown, key=_order), key=lambda row: row.keys):
        label, colour, marker = FAMILIES.get(keys, OTHER)
        points = list(group)
        losses = [row.loss[column] for row in points]
        axes.errorbar(
            [row.everything for row in points],
            [loss.mean for loss in losses],
            yerr=[
                [loss.mean - loss.low for loss in losses],
                [loss.high - loss.mean for loss in losses],
            ],
            fmt=marker,
            color=colour,
            markersize=6,
            capsize=2.5,
            elinewidth=1.2,
            label=label,
        )
        for row in points:
            if after := learnt.get(row.name):
                axes.plot(
                    [row.everything, after.everything],
                    [row.loss[column].mean, after.loss[column].mean],
                    color=colour,
                    marker=marker,
                    markersize=6,
                    markerfacecolor="white",
                    markevery=[1],
                    linewidth=0.9,
                    linestyle=":",
                )
    ranges = [row.loss[column] for row in [*shown, *learnt.values()]]
    low = min(0.0, *(loss.low for loss in ranges))
    high = max(LINEAR, *(loss.high for loss in ranges))
    axes.set_xscale("log", base=2)
    bytes_ = [row.everything for row in shown]
    axes.set_xlim(min(bytes_) / 1.25, max(bytes_) * 1.25)
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
    axes.set_ylim(1.3 * low - LINEAR / 3, 2.5 * high)
    steps = [1, 1.25, 1.5, 1.75]
    axes.xaxis.set_major_locator(
        FixedLocator([2**power * step for power in range(1, 13) for step in steps])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    decades = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([-loss for loss in decades] + [0.0, *decades]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+g}%"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.axhline(0, color="#404040", linewidth=0.9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _order(row: Row) -> int:
    return list(FAMILIES).index(row.keys) if row.keys in FAMILIES else len(FAMILIES)


def _label(axes: Axes, shown: Sequence[Row], learnt: Mapping[str, Row], column: str) -> None:
    """Writes each preset's name near its point, where it covers no other name, point or line."""
    pixels = axes.figure.dpi / 72

    def place_of(row: Row) -> np.ndarray:
        return axes.transData.transform((row.everything, row.loss[column].mean))

    centres = {row.name: place_of(row) for row in shown}
    after = {f"{row.name}, trained": place_of(row) for row in learnt.values()}
    half = 5 * pixels
    drawn = _Drawn(
        inside=axes.get_window_extent(),
        points={
            name: Bbox.from_extents(x - half, y - half, x + half, y + half)
            for name, (x, y) in [*centres.items(), *after.items()]
        },
        bars=[
            Bbox(
                axes.transData.transform([(row.everything, loss.low), (row.everything, loss.high)])
            )
            for row in shown
            for loss in (row.loss[column],)
        ],
        names=[],
        lines=[],
    )

    def crowd(row: Row) -> float:
        x, y = centres[row.name]
        return sum(math.hypot(x - a, y - b) < 60 * pixels for a, b in centres.values())

    # Where there is most room, names find a place last as well.
    for row in sorted(shown, key=crowd, reverse=True):
        colour = FAMILIES.get(row.keys, OTHER)[1]
        text = axes.annotate(
            row.name,
            (row.everything, row.loss[column].mean),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9.5,
            color=colour,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1},
        )
        x, y = centres[row.name]
        # Of the name alone: an annotation's own extent includes its line.
        size = Text.get_window_extent(text).size
        box = Bbox.from_bounds(0, 0, *size).padded(pixels)
        places = [
            (distance, box.translated(*_beside(x, y, box, distance * pixels, angle)))
            for distance in range(8, 100, 5)
            for angle in range(0, 360, 30)
        ]
        costs = [distance + drawn.cost(row.name, place) for distance, place in places]
        distance, place = places[costs.index(min(costs))]
        tied = distance > NEAR or drawn.misleading(row.name, place)
        drawn.names.append(place)
        if tied:
            drawn.lines.append(_line(drawn.points[row.name], place))
        middle_x, middle_y = _middle(place)
        text.set_position(((middle_x - x) / pixels, (middle_y - y) / pixels))
        assert text.arrow_patch is not None
        text.arrow_patch.set_visible(tied)


@dataclass(frozen=True)
class _Drawn:
    """What a panel holds so far, in pixels.

    Attributes:
        inside: the panel.
        points: around each point, by the name of its preset.
        bars: from the best to the worst seed of each preset.
        names: the names that have a place.
        lines: points on the lines that tie names to their points.
    """

    inside: Bbox
    points: Mapping[str, Bbox]
    bars: Sequence[Bbox]
    names: list[Bbox]
    lines: list[np.ndarray]

    def cost(self, name: str, place: Bbox) -> float:
        """How bad a place for a name is: what it covers, and what its line would strike."""
        own = self.points[name]
        outside = not (
            self.inside.contains(place.x0, place.y0) and self.inside.contains(place.x1, place.y1)
        )
        covered = sum(map(place.overlaps, [*self.points.values(), *self.bars, *self.names]))
        covered += sum(_meets(line, place) for line in self.lines)
        # No line can avoid the points that cover its own.
        others = [point for point in self.points.values() if not point.overlaps(own)]
        line = _line(own, place)
        struck = sum(_meets(line, box) for box in [*others, *self.names])
        return 300 * (outside + covered) + 40 * struck + 40 * self.misleading(name, place)

    def misleading(self, name: str, place: Bbox) -> bool:
        """Whether the name would be as near to another point as to its own."""
        gaps = {other: _gap(point, place) for other, point in self.points.items()}
        own = gaps.pop(name)
        return any(gap < 1.3 * own for gap in gaps.values())


def _middle(box: Bbox) -> tuple[float, float]:
    return box.x0 + box.width / 2, box.y0 + box.height / 2


def _line(point: Bbox, name: Bbox) -> np.ndarray:
    """Points on the straight line between two middles, `[points, 2]`."""
    return np.linspace(_middle(point), _middle(name), 40)


def _meets(line: np.ndarray, box: Bbox) -> bool:
    """Whether a part of a line lies in a box."""
    return bool(np.any(np.all((line > box.min) & (line < box.max), axis=1)))


def _gap(first: Bbox, second: Bbox) -> float:
    """The distance between the middle of one box and the nearest part of another."""
    x, y = _middle(first)
    return math.hypot(max(second.x0 - x, 0, x - second.x1), max(second.y0 - y, 0, y - second.y1))


def _beside(x: float, y: float, box: Bbox, distance: float, angle: float) -> tuple[float, float]:
    """The lower left corner of a box at a distance from a point, seen under an angle."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return (
        x + across * (distance + box.width / 2) - box.width / 2,
        y + up * (distance + box.height / 2) - box.height / 2,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads results and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="what quality.py wrote")
    parser.add_argument("picture", type=Path, help="a .png file")
    options = parser.parse_args(arguments)
    matplotlib.use("Agg")
    figure = draw(json.loads(options.results.read_text(encoding="utf-8")))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture)


if __name__ == "__main__":
    main()
