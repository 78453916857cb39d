"""What a quality study found: losses relative to the exact cache, and their spread over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXACT = "exact"

METRICS = {
    "books": ("books", "bits_per_byte"),
    "books, late": ("books", "late_bits_per_byte"),
    "WikiText": ("wikitext", "bits_per_byte"),
    "WikiText, late": ("wikitext", "late_bits_per_byte"),
    "copy": ("copy", "bits_per_byte"),
    "key-value": ("key_value", "bits_per_byte"),
}
"""Bits per byte by the name of their column: in which part of a run's scores they are."""


@dataclass(frozen=True)
class Spread:
    """A number for each seed.

    Attributes:
        mean: over the seeds.
        low: the least.
        high: the greatest.
        seeds: how many there are.
    """

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """One preset of a study.

    Attributes:
        name: the preset's.
        keys: the class of its key codec; "evicted" where tokens are forgotten.
        calibrated: whether the numbers are those of calibrated runs.
        calibratable: whether there is something to calibrate.
        marginal: bytes of one more token in one KV head.
        everything: bytes per token and KV head at the study's context, all counted.
        bits: bits per byte, by column; absent where nothing was scored.
        loss: the same relative to the exact cache, 0.01 for a hundredth more.
        accuracy: the share of the digits' tokens that were the most probable ones.
    """

    name: str
    keys: str
    calibrated: bool
    calibratable: bool
    marginal: int
    everything: float
    bits: Mapping[str, Spread]
    loss: Mapping[str, Spread]
    accuracy: Spread


def rows(results: Mapping[str, Any], *, calibrated: bool) -> list[Row]:
    """The presets in the study's order.

    Args:
        results: what the study wrote.
        calibrated: whether calibratable presets are taken from their calibrated runs, or from
            the run without a calibration. Presets without such runs are left out.

    Raises:
        ValueError: there are no results of the exact cache to compare with.
    """
    presets = {preset["name"]: preset for preset in results["presets"]}
    if EXACT not in presets:
        raise ValueError("the results lack the exact cache, with which the others are compared")
    exact = presets[EXACT]["runs"][0]["scores"]
    made = []
    for preset in presets.values():
        wanted = calibrated and preset["calibratable"]
        scores = [
            run["scores"]
            for run in preset["runs"]
            if (run["calibration_seed"] is not None) == wanted
        ]
        if not scores:
            continue
        columns = {
            name: (values, reference)
            for name, (part, key) in METRICS.items()
            if (reference := exact[part][key]) is not None
            and (values := [score[part][key] for score in scores])
        }
        made.append(
            Row(
                name=preset["name"],
                keys=preset["keys"],
                calibrated=wanted,
                calibratable=preset["calibratable"],
                marginal=preset["bytes_per_token_head"],
                everything=preset["everything_per_token_head"],
                bits={name: _spread(values) for name, (values, _) in columns.items()},
                loss={
                    name: _spread([value / reference - 1 for value in values])
                    for name, (values, reference) in columns.items()
                },
                accuracy=_spread([score["key_value"]["accuracy"] for score in scores]),
            )
        )
    return made


def merge_finetuned(
    earlier: Mapping[str, Any] | None, found: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The results of `quality_finetuned.py`, put together from several runs.

    Args:
        earlier: those of other presets, if any; its control, of the exact cache, remains.
        found: what is added.

    Raises:
        ValueError: the runs differ in more than their presets, or have presets in common.
    """
    if earlier is None:
        return found
    different = [
        name
        for name in sorted({*earlier["settings"], *found["settings"]} - {"cache", "out"})
        if earlier["settings"].get(name) != found["settings"].get(name)
    ]
    different += [name for name in ("device", "versions") if earlier[name] != found[name]]
    if different:
        raise ValueError(f"the runs cannot be compared; they differ in {', '.join(different)}")
    known = {preset["name"] for preset in earlier["presets"]}
    added = [preset for preset in found["presets"] if preset["name"] != EXACT]
    if twice := [preset["name"] for preset in added if preset["name"] in known]:
        raise ValueError(f"there are results already for {', '.join(twice)}")
    settings = dict(earlier["settings"])
    settings["cache"] = [*settings["cache"], *found["settings"]["cache"]]
    return {**earlier, "settings": settings, "presets": [*earlier["presets"], *added]}


def markdown(results: Mapping[str, Any]) -> str:
    """The study as Markdown: tables of calibrated, uncalibrated and, if any, finetuned presets."""
    sections = []
    for title, calibrated in [("Calibrated", True), ("Without a calibration", False)]:
        chosen = [
            row
            for row in rows(results, calibrated=calibrated)
            if calibrated or row.calibratable or row.name == EXACT
        ]
        table = _table(chosen, results["settings"]["context"])
        sections.append(f"{title}:\n\n{_lines(table)}")
    if finetuned := results.get("finetuned"):
        chosen = rows(finetuned, calibrated=True)
        table = _table(chosen, finetuned["settings"]["context"])
        training = {
            preset["name"]: preset["runs"][0]["training"] for preset in finetuned["presets"]
        }
        exact = training[EXACT]
        table[0] += ["training, tokens/s", "time of a step", "memory of a step"]
        for row, cells in zip(chosen, table[1:], strict=True):
            own = training[row.name]
            ratio = exact["tokens_per_second"] / own["tokens_per_second"]
            cells += [
                f"{own['tokens_per_second']:.0f}",
                f"{ratio:.2f}",
                f"{own['nbytes'] / 1e9:.1f} GB",
            ]
        sections.append(f"Finetuned:\n\n{_lines(table)}")
    return "\n\n".join(sections)


def _table(chosen: Sequence[Row], context: int) -> list[list[str]]:
    """The cells of a header and of a line for each row."""
    columns = [name for name in METRICS if name in chosen[0].bits]
    table = [
        ["preset", "marginal bytes", f"everything at {context}", *columns, "key-value accuracy"]
    ]
    for row in chosen:
        cells = [_cell(row, name) for name in columns]
        accuracy = f"{100 * row.accuracy.mean:.1f}%"
        table.append(
            [f"`{row.name}`", f"{row.marginal}", f"{row.everything:.1f}", *cells, accuracy]
        )
    return table


def _lines(table: Sequence[Sequence[str]]) -> str:
    header, *others = table
    lines = [header, ["---"] * len(header), *others]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _spread(values: list[float]) -> Spread:
    return Spread(sum(values) / len(values), min(values), max(values), len(values))


def _cell(row: Row, column: str) -> str:
    """The exact cache's bits per byte, and how many more others need; the range over seeds.

    The answers of the key-value lines cost the exact cache next to nothing, so that a ratio to it
    says nothing: there, bits per byte are shown for all.
    """
    bits, loss = row.bits[column], row.loss[column]
    if row.name == EXACT or column == "key-value":
        return f"{bits.mean:.4f}"
    cell = f"{100 * loss.mean:+.2f}%"
    if loss.seeds > 1:
        cell += f" ({100 * loss.low:+.2f} to {100 * loss.high:+.2f})"
    return cell
