"""Two real processes that decode or train together, over Gloo, as hosts of a cluster do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from toy import load_quietly

from train.job import run
from train.log import read_log
from train.options import Job

pytestmark = pytest.mark.once

PROMPTS = ("the cat", "hat")


def start(index, *command, devices):
    """One process of two; `command` is the same in both."""
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        PYTHONPATH=os.pathsep.join(sys.path),
        PYTHONWARNINGS="ignore",
    )
    begin = [sys.executable, "-u", "-m", "h1bjax.cli", *map(str, command)]
    return subprocess.Popen(
        [*begin, "--processes", "2", "--process", str(index)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_pair(*command):
    """What both print, the first with its complaints."""
    command = (*command, "--coordinator", address())
    pair = [start(index, *command, devices=2) for index in range(2)]
    (first, complaints), (second, others) = (one.communicate(timeout=400) for one in pair)
    assert [one.returncode for one in pair] == [0, 0], complaints + others
    return first, complaints, second, others


def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def test_two_processes_generate_what_one_does(toy_folder):
    command = ["generate", "--model", toy_folder, "--cache", "h1b-signs"]
    command += ["--mesh", "batch=2,tensor=2", "--max-new-tokens", "8"]
    for prompt in PROMPTS:
        command += ["--prompt", prompt]
    first, complaints, second, others = run_pair(*command)
    expected = load_quietly(toy_folder, "h1b-signs").generate(list(PROMPTS), max_new_tokens=8)
    for prompt, text in zip(PROMPTS, expected.text, strict=True):
        assert prompt + text in first
        assert prompt + text not in second
    assert "cache h1b-signs" in complaints
    assert "cache h1b-signs" not in others


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "h1b-signs"])
def test_two_processes_train_what_one_does(toy_folder, tmp_path, cache):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog sat on the log.\n" * 40)
    job = Job(
        text=(text,),
        valid=(text,),
        out=tmp_path / "one",
        steps=4,
        model=str(toy_folder),
        cache=cache,
        batch=4,
        context=80,
        dtype="float32",
        checkpoint_every=3,
    )
    run(job)
    out = tmp_path / "two"
    command = ["finetune", "--model", toy_folder, "--text", text, "--valid", text, "--out", out]
    command += ["--steps", job.steps, "--batch", job.batch, "--context", job.context]
    command += ["--dtype", job.dtype, "--checkpoint-every", job.checkpoint_every]
    command += ["--mesh", "batch=2,tensor=2", *(["--cache", cache] if cache else [])]
    first, _, second, _ = run_pair(*command)
    assert "bits per byte" in first
    assert second == ""

    found, expected = (read_log(folder / "log.csv") for folder in (out, job.out))
    assert [row.step for row in found] == [row.step for row in expected]
    assert [row.loss for row in found] == pytest.approx([row.loss for row in expected], rel=1e-3)
    found, expected = (
        json.loads((folder / "evaluation.json").read_text())["caches"] for folder in (out, job.out)
    )
    assert found.keys() == expected.keys()
    for name, figures in expected.items():
        assert found[name] == pytest.approx(figures, rel=1e-3)
    assert load_quietly(out / "model").generate("the", max_new_tokens=2).text


@pytest.mark.slow
def test_when_one_process_is_lost_the_other_says_so_and_ends(toy_folder):
    command = ["generate", "--model", toy_folder, "--cache", "h1b-signs", "--stream"]
    command += ["--mesh", "tensor=2", "--max-new-tokens", "900", "--prompt", "the"]
    command += ["--coordinator", address()]
    pair = [start(index, *command, devices=1) for index in range(2)]
    try:
        read = ""
        while "the" not in read:
            character = pair[0].stdout.read(1)
            assert character, pair[0].stderr.read()
            read += character
        pair[1].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        _, complaints = pair[0].communicate(timeout=60)
        assert time.monotonic() - begin < 60
        assert pair[0].returncode == 2
        assert "h1bjax: error:" in complaints
        assert "if another one was lost, its own messages say why" in complaints
    finally:
        for one in pair:
            one.kill()
            one.communicate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "--coordinator, --processes and --process belong together"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            "--process 2 is none of 0 to 1",
        ),
    ],
)
def test_processes_that_cannot_be_are_refused(toy_folder, options, message, capsys):
    from h1bjax.cli import main

    assert main(["generate", "--model", str(toy_folder), "--prompt", "a", *options]) == 2
    assert message in capsys.readouterr().err
