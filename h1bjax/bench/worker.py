"""Each measurement in a process of its own, so that memory and caches are its alone.

`python -m h1bjax.bench.worker` reads one job from stdin and prints its outcome, both as JSON;
`run` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any

from h1bjax.bench.case import Case, Measured

MEASURES = {
    "decode": "h1bjax.bench.decode",
    "prefill": "h1bjax.bench.prefill",
    "transformers": "h1bjax.bench.transformers_peer",
}
"""Modules with a function `measure`, by the name of their kind of job."""

MEMORY_FRACTION = "0.95"
"""Of the device's memory that JAX takes, where the environment does not say otherwise."""


def run(kind: str, case: Case) -> Measured | str:
    """Measures in a new process.

    Args:
        kind: one of `MEASURES`.
        case: what to measure.

    Returns:
        The measurement; or, where something went wrong that another case may be spared, such as
        memory that does not suffice, one line that says what.

    Raises:
        RuntimeError: the process died otherwise.
    """
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION} | os.environ
    job = {"kind": kind, "case": case.to_json()}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"measuring {case.preset!r} ended with {done.returncode}: {last}")
    outcome = json.loads(lines[-1])
    if "error" in outcome:
        return outcome["error"]
    return Measured.from_json(outcome)


def _main() -> None:
    job = json.load(sys.stdin)
    sys.stdout.write(json.dumps(_outcome(job["kind"], job["case"])) + "\n")


def _outcome(kind: str, case: dict[str, Any]) -> dict[str, Any]:
    try:
        return import_module(MEASURES[kind]).measure(Case.from_json(case)).to_json()
    # Exhausted memory is a RuntimeError, both JAX's and torch's.
    except (ValueError, ImportError, RuntimeError) as error:
        line = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {line[:300]}"}


if __name__ == "__main__":
    _main()
