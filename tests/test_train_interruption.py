"""What can happen to a job while it runs: a kill, damage to what it saved, a full disk."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from damage import flip_a_byte, largest
from toy import write_toy

import train.loop
from h1bjax.cache import CacheSpec
from h1bjax.calibration_file import calibration_path, find_calibration
from train.checkpoint import Checkpoints
from train.job import run
from train.log import read_log
from train.options import CODEC_RATE, Job
from train.step import train_step

pytestmark = [
    pytest.mark.once,
    # What Orbax's threads leave behind where saving or restoring failed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

REPOSITORY = Path(__file__).parents[1]
CACHE = "h1b-paper"
STEPS, EVERY = 60, 6


@pytest.fixture(scope="module")
def files(tmp_path_factory, toy_folder):
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog sat on the log.\n" * 20)
    shutil.copytree(toy_folder, folder / "model")
    return folder


def job_in(files, out):
    return Job(
        text=(files / "text.txt",),
        out=out,
        steps=STEPS,
        model=str(files / "model"),
        cache=CACHE,
        trained="decoders",
        batch=2,
        context=24,
        dtype="float32",
        checkpoint_every=EVERY,
    )


def command(job):
    options = {
        "--model": job.model,
        "--cache": job.cache,
        "--train": job.trained,
        "--text": job.text[0],
        "--out": job.out,
        "--steps": job.steps,
        "--batch": job.batch,
        "--context": job.context,
        "--dtype": job.dtype,
        "--checkpoint-every": job.checkpoint_every,
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "h1bjax.cli", "finetune", *words]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The job run without interruption."""
    job = job_in(files, tmp_path_factory.mktemp("finished") / "out")
    (files / "valid.txt").write_text("the log sat on the cat.\n")
    outcome = run(replace(job, valid=(files / "valid.txt",)))
    assert outcome.evaluations.keys() == {"exact", CACHE}
    return job


def arrays(job):
    """All that the job trained, to the bit."""
    path = calibration_path(job.out / "model", CACHE)
    return path.with_suffix(".safetensors").read_bytes()


def unfinished(finished, out):
    """A copy of the finished job as it was before it exported."""
    shutil.copytree(finished.out, out, ignore=shutil.ignore_patterns("model"))
    return replace(finished, out=out)


def test_a_killed_job_goes_on_to_the_same_bits(finished, files, tmp_path):
    job = job_in(files, tmp_path / "out")
    process = subprocess.Popen(
        command(job),
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not any((job.out / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (job.out / "model").exists()
    assert 0 < len(read_log(job.out / "log.csv")) < len(read_log(finished.out / "log.csv"))

    run(job)
    assert arrays(job) == arrays(finished)
    rows, expected = (read_log(each.out / "log.csv") for each in (job, finished))
    assert [(row.step, row.loss, row.divergence) for row in rows] == [
        (row.step, row.loss, row.divergence) for row in expected
    ]


def cut_off(folder):
    """As when the machine lost its power before the list of checksums was written."""
    (folder / "checksums.json").unlink()
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_off, lambda folder: largest(folder).unlink()])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, tmp_path, monkeypatch, damage):
    job = unfinished(finished, tmp_path / "out")
    damage(job.out / "checkpoints" / str(STEPS))
    taken = []

    def counted(state, *rest):
        taken.append(int(state.step))
        return train_step(state, *rest)

    monkeypatch.setattr(train.loop, "train_step", counted)
    with pytest.warns(UserWarning, match=f"checkpoint of step {STEPS} in .* is damaged"):
        run(job)
    assert taken == list(range(STEPS - EVERY, STEPS))
    assert arrays(job) == arrays(finished)
    with Checkpoints(job.out / "checkpoints") as checkpoints:
        assert checkpoints.latest == STEPS


def test_without_a_sound_checkpoint_the_job_begins_anew(finished, tmp_path):
    job = unfinished(finished, tmp_path / "out")
    for folder in (job.out / "checkpoints").glob("[0-9]*"):
        flip_a_byte(folder)
    with pytest.warns(UserWarning, match="is damaged"):
        run(job)
    assert arrays(job) == arrays(finished)


def test_a_full_disk_loses_nothing_that_was_saved(finished, files, tmp_path, monkeypatch):
    job = job_in(files, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(state, *rest):
        if int(state.step) == 3 * EVERY:
            # Files may not grow beyond this, which has the same effect. The checkpoint of this
            # step is being written.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        return train_step(state, *rest)

    monkeypatch.setattr(train.loop, "train_step", filling)
    kept = f"step ({3 * EVERY} could not be saved; step {2 * EVERY}|{4 * EVERY} .* {3 * EVERY}) is"
    try:
        with pytest.raises(OSError, match=kept):
            run(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(train.loop, "train_step", train_step)
    run(job)
    assert arrays(job) == arrays(finished)


def test_only_what_trains_differs_from_the_model_before(finished, files):
    weights = [folder / "model.safetensors" for folder in (finished.out / "model", files / "model")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found = find_calibration(finished.out / "model", CacheSpec.preset(CACHE))
    assert found is not None
    assert found.codec is not None
    assert (found.codec.temperature[...] != 1).any()


def test_the_log_has_the_rate_of_what_trains(finished):
    rows = read_log(finished.out / "log.csv")
    assert rows[-1].learning_rate == pytest.approx(0.1 * CODEC_RATE)


def test_another_calibration_is_another_job(finished, files, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(finished.out / "model", trained)
    assert (trained / "calibration").is_dir()
    with pytest.raises(ValueError, match=r"holds another training job.*calibration is"):
        run(replace(finished, model=str(trained)))


def test_a_cache_without_its_calibration_is_refused_with_the_remedy(finished, tmp_path):
    with pytest.raises(ValueError, match=r"h1bjax calibrate --model .* --cache h1b --out DIR"):
        run(replace(finished, cache="h1b", context=100, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_named(finished, tmp_path):
    """Here one that knows more tokens than the model."""
    write_toy(tmp_path / "model", vocab_size=100)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(finished.model) / name, tmp_path / "model")
    with pytest.raises(ValueError, match="outside the model's vocabulary of 100"):
        run(replace(finished, model=str(tmp_path / "model"), out=tmp_path / "out"))
