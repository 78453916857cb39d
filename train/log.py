"""The record of a run: a CSV file with one row for every few steps."""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from h1bjax.whole_file import replace_text


@dataclass(frozen=True)
class LogRow:
    """Some steps in a row.

    Attributes:
        step: steps taken at their end.
        loss: nats per token of the next token, their mean.
        divergence: nats per token from the teacher, likewise; None where there is none.
        learning_rate: of the last of them; the key codec's where no weights train.
        tokens_per_second: None where compiling them took most of the time.
    """

    step: int
    loss: float
    divergence: float | None
    learning_rate: float
    tokens_per_second: float | None


_HEADER = [field.name for field in fields(LogRow)]


def read_log(path: Path) -> list[LogRow]:
    """All rows of a log; none where there is no file.

    Raises:
        ValueError: the file is no such log.
    """
    if not path.is_file():
        return []
    # A line that has no end was cut off when the program was.
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    header, *rows = list(csv.reader(whole.splitlines())) or [[]]
    try:
        if header != _HEADER:
            raise ValueError(f"the columns are {header}, not {_HEADER}")
        return [
            LogRow(int(step), float(loss), _number(divergence), float(rate), _number(speed))
            for step, loss, divergence, rate, speed in rows
        ]
    except ValueError as error:
        raise ValueError(f"{path} is not the log of a training: {error}") from error


def write_log(path: Path, rows: Sequence[LogRow]) -> None:
    """Writes a log anew; the old one stays until the new one is whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows(map(astuple, rows))
    replace_text(path, text.getvalue())


def append_log(path: Path, row: LogRow) -> None:
    """Adds a row to a log that exists."""
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(astuple(row))


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
