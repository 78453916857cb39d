"""Benchmarks in local files, in the forms in which they were published, as lists of rows."""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SUFFIXES = {
    "gsm8k": (".jsonl",),
    "mmlu": (".jsonl",),
    "humaneval": (".jsonl",),
    "longeval-lines": (".jsonl",),
    "wikitext": (".txt", ".tokens", ".raw"),
}
"""Endings of the files of each benchmark; any may be followed by .gz."""

_FIELDS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "gsm8k": {"question": str, "answer": str},
    "mmlu": {"split": str, "subject": str, "question": str, "choices": list, "answer": int},
    "humaneval": {"task_id": str, "prompt": str, "test": str, "entry_point": str},
    "longeval-lines": {"prompt": str, "expected_number": int, "num_lines": int},
}

_TITLE = re.compile(r"^ = [^=].*[^=] = ?$", re.MULTILINE)


def find_files(benchmark: str, path: Path) -> list[Path]:
    """The files of a benchmark: `path` itself, or those in the folder `path`, by name.

    Raises:
        FileNotFoundError: there is no such file, or no file of the right ending in the folder.
        ValueError: several files are there for a benchmark of one.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"No such file or folder: {path}")
    endings = SUFFIXES[benchmark]
    found = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.name.removesuffix(".gz").endswith(endings)
    )
    if not found:
        raise FileNotFoundError(f"{path} has no file that ends in {' or '.join(endings)}")
    if len(found) > 1 and benchmark != "longeval-lines":
        raise ValueError(
            f"{path} has several files, of which {benchmark} takes one: "
            f"{', '.join(file.name for file in found)}"
        )
    return found


def read_rows(benchmark: str, path: Path) -> list[Row]:
    """The rows of a benchmark.

    They are JSON lines with at least these fields, each as published:

    - gsm8k: question, answer
    - mmlu: split ("dev" or "test"; others are left out), subject, question, choices, answer (the
      right choice's index)
    - humaneval: task_id, prompt, test, entry_point
    - longeval-lines: prompt, expected_number, num_lines

    WikiText is text in which a line " = Title = " begins each article; a row's "page" is one.

    Raises:
        FileNotFoundError: see `find_files`.
        ValueError: a file is damaged or of another form, or has no rows.
    """
    rows = [
        row
        for file in find_files(benchmark, path)
        for row in (_articles(file) if benchmark == "wikitext" else _lines(benchmark, file))
    ]
    if benchmark == "mmlu":
        rows = [row for row in rows if row["split"] in ("dev", "test")]
        _check_subjects(rows, path)
    if not rows:
        raise ValueError(f"{path} has no rows of {benchmark}")
    return rows


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is damaged, or not UTF-8: {error}") from error


def _articles(file: Path) -> list[Row]:
    text = _text(file)
    begins = [match.start() for match in _TITLE.finditer(text)]
    if not begins:
        raise ValueError(f'{file} is not WikiText: no line like " = Title = " begins an article')
    ends = [*begins[1:], len(text)]
    return [{"page": text[begin:end]} for begin, end in zip(begins, ends, strict=True)]


def _lines(benchmark: str, file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not valid JSON: {error}") from error
        rows.append(_checked(benchmark, row, where))
    return rows


def _checked(benchmark: str, row: Any, where: str) -> Row:
    """The wanted fields of a row, which must be there."""
    fields = _FIELDS[benchmark]
    wrong = [
        name
        for name, kind in fields.items()
        if not isinstance(row, dict) or not isinstance(row.get(name), kind)
    ]
    if wrong:
        raise ValueError(f"{where} is no row of {benchmark}: it lacks {', '.join(wrong)}")
    row = {name: row[name] for name in fields}
    if benchmark == "mmlu" and not (len(row["choices"]) == 4 and 0 <= row["answer"] < 4):
        raise ValueError(f"{where} has no 4 choices, or an answer that is none of them")
    return row


def _check_subjects(rows: Sequence[Row], path: Path) -> None:
    """A subject without examples to show would be asked in another way than the others."""
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["subject"], set()).add(row["split"])
    for split in ("dev", "test"):
        if lacking := sorted(subject for subject, found in splits.items() if split not in found):
            raise ValueError(f"{path} has no {split} rows of {', '.join(lacking)}")
