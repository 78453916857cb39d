"""The benchmarks that `h1bjax eval` knows, as tasks of lm-evaluation-harness.

Where the harness has a benchmark, its own definition says how questions are put and answers are
judged, also for local files, of which only the rows are taken. HumanEval and LongEval are defined
here: the harness's HumanEval downloads a program to judge answers with, and it has no LongEval.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager

from h1bjax.harness.local_data import Row, read_rows
from h1bjax.harness.programs import succeeds

_OFFICIAL = {
    "gsm8k": ("gsm8k_cot", "gsm8k/gsm8k-cot.yaml"),
    "wikitext": ("wikitext", "wikitext/wikitext.yaml"),
}
"""The harness's task, and its definition within the harness's folder of tasks."""

_HUMANEVAL_ENDS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
"""What follows a finished function, as the harness's own definition has it."""

_HUMANEVAL_ON_HUB = "openai/openai_humaneval"
_HUMANEVAL_TOKENS = 512
_LONGEVAL_TOKENS = 32


@dataclass(frozen=True)
class Chosen:
    """What the harness is to run.

    Attributes:
        tasks: names that `manager` knows.
        manager: finds tasks by name.
    """

    tasks: list[str]
    manager: TaskManager


def hub_tasks(benchmark: str, folder: Path) -> Chosen:
    """A benchmark whose rows come from the Hugging Face hub.

    Args:
        benchmark: see `h1bjax.harness.local_data`.
        folder: an empty one, in which the harness may find the task; it must outlive the run.

    Raises:
        ValueError: the hub does not have it.
    """
    if benchmark == "longeval-lines":
        raise ValueError("longeval-lines is not on the hub: give its files with --data")
    if benchmark == "humaneval":
        return _in_folder(folder, [_write_humaneval(folder, {"dataset_path": _HUMANEVAL_ON_HUB})])
    name = _OFFICIAL[benchmark][0] if benchmark in _OFFICIAL else benchmark
    return named_tasks([name])


def named_tasks(names: Sequence[str]) -> Chosen:
    """Tasks, groups and tags of the harness, by name or pattern.

    Raises:
        ValueError: it has no such task.
    """
    manager = TaskManager()
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists all"
        )
    return Chosen(manager.match_tasks(list(names)), manager)


SHOTS = {"mmlu": 5}
"""Solved examples before each question, where the harness's definition leaves it open."""


def local_tasks(benchmark: str, data: Path, folder: Path) -> Chosen:
    """A benchmark whose rows come from local files.

    Args:
        benchmark: see `h1bjax.harness.local_data`.
        data: a file, or a folder with it.
        folder: an empty one, in which the harness finds tasks and rows; it must outlive the run.

    Raises:
        FileNotFoundError: see `find_files`.
        ValueError: see `read_rows`.
    """
    rows = read_rows(benchmark, data)
    if benchmark == "humaneval":
        dataset = _dataset(folder, benchmark, {"test": rows})
        return _in_folder(folder, [_write_humaneval(folder, dataset)])
    if benchmark == "longeval-lines":
        groups = sorted(_by(rows, "num_lines").items())
        return _in_folder(folder, [_write_longeval(folder, *group) for group in groups])
    if benchmark == "mmlu":
        return _in_folder(folder, [_write_mmlu(folder, rows)])
    name, definition = _OFFICIAL[benchmark]
    # The harness prefers a test split where a definition names several.
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    dataset = _dataset(folder, benchmark, {"test": rows})
    _write_official(folder, name, definition, splits | dataset)
    return _in_folder(folder, [name])


def _in_folder(folder: Path, names: list[str]) -> Chosen:
    return Chosen(names, TaskManager(include_path=str(folder), include_defaults=False))


def _by(rows: Sequence[Row], field: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return groups


def _dataset(folder: Path, name: str, splits: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Writes rows, and says to the harness where they are."""
    files = {}
    for split, rows in splits.items():
        file = folder / f"{name}_{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }


def _write_official(folder: Path, name: str, definition: str, changes: Mapping[str, Any]) -> None:
    """A definition that is the harness's own but for `changes`."""
    official = Path(lm_eval.tasks.__file__).parent / definition
    if not official.is_file():
        raise ValueError(f"this version of lm-evaluation-harness has no {definition}")
    _write(folder, name, {"include": str(official), "task": name, **changes})


def _write_mmlu(folder: Path, rows: Sequence[Row]) -> str:
    names = []
    for subject, chosen in sorted(_by(rows, "subject").items()):
        name = f"mmlu_{subject}"
        dataset = _dataset(folder, name, _by(chosen, "split"))
        _write_official(folder, name, f"mmlu/default/{name}.yaml", {"tag": [], **dataset})
        names.append(name)
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    _write(folder, "mmlu", {"group": "mmlu", "task": names, "aggregate_metric_list": [mean]})
    return "mmlu"


def _write_humaneval(folder: Path, dataset: Mapping[str, Any]) -> str:
    config = {
        # The harness asks for a confirmation before it runs such a task.
        "unsafe_code": True,
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}",
        "generation_kwargs": {
            "until": list(_HUMANEVAL_ENDS),
            "max_gen_toks": _HUMANEVAL_TOKENS,
            "do_sample": False,
        },
    }
    return _write_own(folder, "humaneval", config | dict(dataset), judge_function, "pass@1")


def _write_longeval(folder: Path, lines: int, rows: Sequence[Row]) -> str:
    name = f"longeval_lines_{lines}"
    config = {
        # A space at the end of a prompt is a token that no text has there.
        "doc_to_text": "{{prompt.rstrip()}}",
        "doc_to_target": "{{expected_number}}",
        "generation_kwargs": {
            "until": ["\n\n"],
            "max_gen_toks": _LONGEVAL_TOKENS,
            "do_sample": False,
        },
        **_dataset(folder, name, {"test": rows}),
    }
    return _write_own(folder, name, config, judge_number, "acc")


def _write_own(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    judge: Callable[[Row, Sequence[str]], dict[str, float]],
    metric: str,
) -> str:
    """A task that is defined here, of texts that `judge` judges."""
    # The harness finds functions in files beside the definition that names them.
    module = f"judge_{name}"
    code = f"from {judge.__module__} import {judge.__name__}\n"
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    whole = {
        "task": name,
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,
        "process_results": _Function(f"{module}.{judge.__name__}"),
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **config,
    }
    _write(folder, name, whole)
    return name


@dataclass(frozen=True)
class _Function:
    """A function, as definitions name it."""

    name: str


class _Dumper(yaml.SafeDumper):
    """Writes functions too."""


_Dumper.add_representer(
    _Function, lambda dumper, function: dumper.represent_scalar("!function", function.name)
)


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    text = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def judge_function(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Runs a completed function against its tests."""
    check = f"{row['test']}\ncheck({row['entry_point']})\n"
    return {"pass@1": float(succeeds(f"{row['prompt']}{results[0]}\n{check}"))}


def judge_number(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Whether the first whole number of an answer is the right one."""
    found = re.search(r"\d+", results[0])
    return {"acc": float(found is not None and int(found[0]) == row["expected_number"])}
