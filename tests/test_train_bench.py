"""The timing of training steps."""

import json
import re

import pytest
from toy import toy_config

from h1bjax.cache import CacheSpec
from train import bench
from train.options import RANK
from train.student import Scope

pytestmark = pytest.mark.once


def test_all_caches_train_the_same_where_they_can():
    exact, h1b = CacheSpec.preset("exact"), CacheSpec.preset("h1b-2plane-v2")
    for spec in (exact, h1b):
        assert bench.scope_of(spec, "lora") == Scope(spec, "lora", RANK)
        assert bench.scope_of(spec, "everything") == Scope(spec)
    assert bench.scope_of(exact, "decoders") == Scope(exact)
    assert bench.scope_of(exact, "temperatures") == Scope(exact)
    assert bench.scope_of(h1b, "decoders") == Scope(h1b, "decoders")


@pytest.mark.slow
def test_every_cache_is_timed_with_and_without_a_teacher(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(toy_config().to_hf()))
    shape = ["--batch", "2", "--context", "80", "--repeats", "1"]
    bench.main(["--config", str(config), *shape, "--cache", "h1b-2plane-v2"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        ["exact", "untaught"],
        ["exact", "taught"],
        ["h1b-2plane-v2", "untaught"],
        ["h1b-2plane-v2", "taught"],
    ]
    ratios = [float(ratio) for ratio in re.findall(r"ratio ([\d.]+)", "\n".join(lines))]
    assert len(ratios) == 4
    assert ratios[0] == 1
    assert all(ratio > 0 for ratio in ratios)
    assert all("xla: the default device is no NVIDIA GPU" in line for line in lines)
