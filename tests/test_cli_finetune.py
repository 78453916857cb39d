"""`h1bjax finetune`: its options reach the job, and mistakes cost no time."""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from toy import toy_config

from h1bjax import cli
from h1bjax.cli import finetune
from train import options
from train.student import TRAINED

# The command line makes lines of warnings, so they must reach it.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("default")]

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 30)
    return path


def command(text, out, *more):
    return [str(part) for part in ("finetune", "--text", text, "--out", out, "--steps", 3, *more)]


def fails(arguments, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_trains_from_random_weights_and_evaluates(tmp_path, text, toy_folder, capfd):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(toy_config().to_hf()))
    out = tmp_path / "out"
    begin = ("--init", config, "--tokenizer", toy_folder, "--valid", text, text)
    shape = ("--batch", 2, "--context", 16, "--microbatches", 2, "--dtype", "float32")
    recipe = ("--learning-rate", 0.005, "--warmup", 1, "--weight-decay", 0, "--seed", 5)
    code = cli.main(command(text, out, *begin, *shape, *recipe, "--checkpoint-every", 2))
    printed = capfd.readouterr().out
    assert code == 0
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert f"model           {out / 'model'}\n" in printed
    assert f"bits per byte   {evaluation['caches']['exact']['bits_per_byte']:.6f}\n" in printed
    settings = json.loads((out / "job.json").read_text())
    expected = {
        "begin": "random weights",
        "batch": 2,
        "context": 16,
        "microbatches": 2,
        "dtype": "float32",
        "learning_rate": 0.005,
        "warmup": 1,
        "weight_decay": 0.0,
        "seed": 5,
        "steps": 3,
    }
    assert expected.items() <= settings.items()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "one of the arguments --init --model is required"),
        (["--init", "c.json"], "--tokenizer belongs to --init"),
        (["--model", "m", "--tokenizer", "t"], "--tokenizer belongs to --init"),
        (["--model", "m", "--init", "c.json"], "not allowed with"),
        (["--model", "m", "--batch", "0"], "'0' is not a whole number"),
        (["--model", "m", "--batch", "5", "--microbatches", "2"], "must be a multiple of 2"),
        (["--model", "m", "--learning-rate", "-1"], "learning_rate=-1.0 must be positive"),
        (["--model", "m", "--train", "decoders"], "decoders belong to a cache; name one"),
        (["--model", "m", "--cache", "h1b", "--train", "temperatures"], "its scores are raw"),
        (["--model", "m", "--cache", "none"], "unknown cache preset 'none'"),
        (["--model", "m", "--rank", "4"], "rank=4 belongs to 'lora'"),
        (["--model", "m", "--distillation", "-1"], "distillation=-1.0 must not be negative"),
        (
            ["--model", "m", "--cache", "h1b", "--train", "decoders", "--learning-rate", "1"],
            "learning_rate=1.0 is that of weights, and with trained='decoders' none train; set "
            "codec_rate instead",
        ),
        (["--model", "m", "--codec-rate", "1"], "codec_rate=1.0 is that of a key codec"),
        (["--model", "m", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["--model", "m", "--valid", "absent.txt"], "No such file: absent.txt"),
    ],
)
def test_mistakes_are_one_line(more, message, text, tmp_path, capsys):
    assert message in fails(command(text, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


def test_defaults_and_choices_are_those_of_the_job():
    """The command repeats them, because it does not import the package at its start."""
    commands = argparse.ArgumentParser().add_subparsers()
    finetune.add_parser(commands)
    parser = commands.choices["finetune"]
    found = parser.parse_args(["--model", "m", "--text", "t", "--out", "o", "--steps", "3"])
    defaults = {
        field.name: field.default
        for field in fields(options.Job)
        if field.default is not MISSING and field.name != "model"
    }
    given = {name: getattr(found, name) for name in defaults}
    assert given | {"valid": tuple(given["valid"])} == defaults

    help = " ".join(parser.format_help().split())
    assert f"--train {{{','.join(TRAINED)}}}" in help
    assert f"of the changes of lora; default: {options.RANK} " in help
    rates = re.search(
        r"default: (\S+) with --init and for lora, otherwise (\S+) .*"
        r"default: (\S+) for temperatures, otherwise (\S+) ",
        help,
    )
    assert rates is not None
    assert [float(rates[1]), float(rates[1]), *map(float, rates.groups()[1:])] == [
        options.RATE_FROM_RANDOM,
        options.RATE_OF_LORA,
        options.RATE_FROM_MODEL,
        options.RATE_OF_TEMPERATURES,
        options.CODEC_RATE,
    ]


def test_a_users_own_train_module_is_named_and_not_run(tmp_path, text):
    (tmp_path / "train.py").write_text("raise SystemExit('the module of the user was run')\n")
    result = subprocess.run(
        [sys.executable, "-m", "h1bjax.cli", *command(text, "out", "--model", "m")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert f"{tmp_path / 'train.py'} hides the package 'train' of h1bjax" in result.stderr
    assert "was run" not in result.stderr


def test_a_package_that_training_needs_is_named(monkeypatch, text, tmp_path, capsys):
    # None makes an import fail as if the package were not installed.
    monkeypatch.setitem(sys.modules, "optax", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "train"]:
        monkeypatch.delitem(sys.modules, name)
    message = fails(command(text, tmp_path / "out", "--model", "m"), capsys)
    assert "training needs optax: pip install 'h1bjax[train]'" in message


def test_an_installation_without_train_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("h1bjax.__file__", str(tmp_path / "h1bjax" / "__init__.py"))
    with pytest.raises(ValueError, match="'train' is not installed beside h1bjax"):
        finetune.check_train_package()
