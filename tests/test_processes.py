"""Two real processes that decode together, over Gloo, as hosts of a cluster do."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from toy import load_quietly

pytestmark = pytest.mark.once

PROMPTS = ("the cat", "hat")


def start(folder, index, *options, devices):
    """One process of two; `options` are the same in both."""
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        PYTHONPATH=os.pathsep.join(sys.path),
        PYTHONWARNINGS="ignore",
    )
    command = [sys.executable, "-u", "-m", "h1bjax.cli", "generate", "--model", str(folder)]
    command += ["--cache", "h1b-signs", *options, "--processes", "2", "--process", str(index)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def test_two_processes_generate_what_one_does(toy_folder):
    options = ["--mesh", "batch=2,tensor=2", "--coordinator", address(), "--max-new-tokens", "8"]
    for prompt in PROMPTS:
        options += ["--prompt", prompt]
    pair = [start(toy_folder, index, *options, devices=2) for index in range(2)]
    (first, complaints), (second, others) = (one.communicate(timeout=240) for one in pair)
    assert [one.returncode for one in pair] == [0, 0], complaints + others
    expected = load_quietly(toy_folder, "h1b-signs").generate(list(PROMPTS), max_new_tokens=8)
    for prompt, text in zip(PROMPTS, expected.text, strict=True):
        assert prompt + text in first
        assert prompt + text not in second
    assert "cache h1b-signs" in complaints
    assert "cache h1b-signs" not in others


def test_when_one_process_is_lost_the_other_says_so_and_ends(toy_folder):
    options = ["--mesh", "tensor=2", "--coordinator", address(), "--max-new-tokens", "900"]
    options += ["--stream", "--prompt", "the"]
    pair = [start(toy_folder, index, *options, devices=1) for index in range(2)]
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
