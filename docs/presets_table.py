"""Writes the table of presets into docs/presets.md: bytes from the library, quality as measured.

    python docs/presets_table.py

Run it after a change of the presets or of docs/quality.json; a test compares the two.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from h1bjax.cache import PRESETS, CacheSpec

DOCS = Path(__file__).parent
PAGE = DOCS / "presets.md"
BEGIN, END = "<!-- the table: docs/presets_table.py -->", "<!-- end of the table -->"

HEAD_DIMS = (64, 128)
CONTEXTS = (2048, 8192)
COLUMNS = ("books", "WikiText", "copy")


def table() -> str:
    """The table in Markdown."""
    measured = _measured()
    rows = [
        [
            "preset",
            *(f"bytes, {dim} channels" for dim in HEAD_DIMS),
            "ratio",
            *(f"at {context}" for context in CONTEXTS),
            *COLUMNS,
            "key-value",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    for name, spec in PRESETS.items():
        wide = HEAD_DIMS[-1]
        marginal = spec.bytes_per_token(wide)
        exact = PRESETS["exact"].bytes_per_token(wide)
        rows.append(
            [
                f"`{name}`",
                *(str(spec.bytes_per_token(dim)) for dim in HEAD_DIMS),
                f"{exact / marginal:.1f}" if marginal else "",
                *(f"{_everything(spec, wide, context):.1f}" for context in CONTEXTS),
                *measured.get(name, [""] * (len(COLUMNS) + 1)),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str) -> str:
    """The page with the table in its place.

    Raises:
        ValueError: the page does not say where that is.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE} needs the lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _everything(spec: CacheSpec, head_dim: int, context: int) -> float:
    """Bytes per token in one KV head, window included."""
    window = 2 * 2 * head_dim * spec.exact_tokens
    return spec.bytes_per_token(head_dim) + window / context


def _measured() -> dict[str, list[str]]:
    """Loss of quality by preset, and the share of digits found."""
    benchmarks = str(DOCS.parent / "benchmarks")
    if benchmarks not in sys.path:
        sys.path.append(benchmarks)
    study = import_module("quality_results")
    results = json.loads((DOCS / "quality.json").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for row in study.rows(results, calibrated=True):
        losses = ["0"] * len(COLUMNS)
        if row.name != study.EXACT:
            losses = [f"{100 * row.loss[column].mean:+.2f}%" for column in COLUMNS]
        found[row.name] = [*losses, f"{100 * row.accuracy.mean:.1f}%"]
    return found


def main() -> None:
    """Rewrites the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
