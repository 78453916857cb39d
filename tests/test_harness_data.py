"""Benchmarks in local files, and programs that judge answers."""

import gzip
import json
import time
from typing import Any

import pytest

from h1bjax.harness.local_data import find_files, read_rows
from h1bjax.harness.programs import check_allowed, succeeds

pytestmark = pytest.mark.once

ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
    "mmlu": {
        "split": "test",
        "subject": "art",
        "question": "?",
        "choices": list("abcd"),
        "answer": 3,
    },
    "humaneval": {
        "task_id": "H/0",
        "prompt": "def f():\n",
        "test": "def check(f): pass\n",
        "entry_point": "f",
    },
    "longeval-lines": {"prompt": "line a: <7>", "expected_number": 7, "num_lines": 1},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("benchmark", ["gsm8k", "humaneval", "longeval-lines"])
def test_rows_have_the_wanted_fields_alone(tmp_path, benchmark):
    row = ROWS[benchmark]
    path = write(tmp_path / "rows.jsonl", [{**row, "more": 1}, row])
    assert read_rows(benchmark, path) == read_rows(benchmark, tmp_path) == [row, row]


def test_rows_may_be_compressed(tmp_path):
    path = tmp_path / "test.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS["gsm8k"]).encode()))
    assert read_rows("gsm8k", tmp_path) == [ROWS["gsm8k"]]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"test.jsonl.gz is damaged"):
        read_rows("gsm8k", path)


def test_mmlu_needs_examples_and_questions_of_each_subject(tmp_path):
    test, example = ROWS["mmlu"], {**ROWS["mmlu"], "split": "dev"}
    path = write(tmp_path / "mmlu.jsonl", [test, example, {**test, "split": "val"}])
    assert read_rows("mmlu", path) == [test, example]
    write(path, [test, example, {**test, "subject": "law"}])
    with pytest.raises(ValueError, match="no dev rows of law"):
        read_rows("mmlu", path)


def test_wikitext_is_cut_at_its_titles(tmp_path):
    articles = [" = One = \n \n First . \n \n = = A part = = \n \n", " = Two = \n \n Last . \n"]
    path = tmp_path / "valid.txt"
    path.write_text(" \n" + "".join(articles), encoding="utf-8")
    assert [row["page"] for row in read_rows("wikitext", path)] == articles
    path.write_text("no title", encoding="utf-8")
    with pytest.raises(ValueError, match="is not WikiText"):
        read_rows("wikitext", path)


@pytest.mark.parametrize(
    ("benchmark", "text", "message"),
    [
        ("gsm8k", "{", r"rows.jsonl:1 is not valid JSON"),
        ("gsm8k", "\n[1]", r"rows.jsonl:2 is no row of gsm8k: it lacks question, answer"),
        ("humaneval", json.dumps({**ROWS["humaneval"], "test": 1}), "it lacks test"),
        ("mmlu", json.dumps({**ROWS["mmlu"], "answer": 4}), "an answer that is none of them"),
        ("mmlu", json.dumps({**ROWS["mmlu"], "choices": []}), "has no 4 choices"),
        ("longeval-lines", " \n", "has no rows of longeval-lines"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, benchmark, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(benchmark, path)


def test_files_are_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or folder: .*nowhere"):
        find_files("gsm8k", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no file that ends in .txt or .tokens or"):
        find_files("wikitext", tmp_path)
    both = [write(tmp_path / f"{name}.jsonl", [ROWS["longeval-lines"]]) for name in "ab"]
    assert find_files("longeval-lines", tmp_path) == both
    with pytest.raises(ValueError, match=r"several files, of which gsm8k takes one: a.jsonl, b"):
        find_files("gsm8k", tmp_path)


def test_the_real_files_are_read(shared_data):
    sizes = {
        "gsm8k": 1319,
        "humaneval": 164,
        "longeval": 100,
        "mmlu": 14042 + 285,
        "wikitext-2": 60,
    }
    names = {"longeval": "longeval-lines", "wikitext-2": "wikitext"}
    for folder, size in sizes.items():
        assert len(read_rows(names.get(folder, folder), shared_data / folder)) == size


# Programs


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert 1 + 1 == 2", True),
        ("if __name__ == '__main__':\n    print('é')", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("import sys; sys.exit(3)", False),
        ("bytearray(8 << 30)", False),
        ("open('file', 'wb').write(bytes(1 << 25))", False),
    ],
)
def test_a_program_succeeds_when_it_ends_well(program, expected):
    assert succeeds(program) == expected


def test_a_program_has_only_so_much_time():
    begin = time.monotonic()
    assert not succeeds("while True: pass", seconds=0.5)
    assert time.monotonic() - begin < 5


def test_what_a_program_starts_ends_with_it(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1); open({str(mark)!r}, 'w')"
    assert succeeds(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])")
    time.sleep(1.5)
    assert not mark.exists()


def test_code_runs_only_with_permission():
    check_allowed(True)
    with pytest.raises(ValueError, match="allow it with --run-generated-code"):
        check_allowed(False)
