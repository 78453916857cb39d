"""The command that reads costs off compiled schedules."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.slow]


def test_costs_are_read_off_the_schedule_of_a_real_chip():
    pytest.importorskip("libtpu")
    # libtpu takes its options when it is loaded, which other tests may have done here.
    command = [sys.executable, "-m", "pallas_kernels.sketch_attention.tpu_cost"]
    done = subprocess.run(
        [*command, "--chips", "v6e", "--variants", "D = 64", "same, G = 16"],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    rows = re.findall(r"^\| (D = 64|same, G = 16) \|(.*)\|$", done.stdout, re.MULTILINE)
    assert [label for label, _ in rows] == ["D = 64", "same, G = 16"]
    costs = []
    for _, figures in rows:
        nbytes, bundles, vector, matrix, memory, exact, faster = map(float, figures.split("|"))
        assert nbytes < 128
        assert 10 < max(vector, matrix) < bundles < exact
        assert faster == pytest.approx(exact / max(bundles, memory), abs=0.1)
        costs.append(bundles)
    assert costs[0] < costs[1]
