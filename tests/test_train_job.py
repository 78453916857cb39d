"""A whole job: what it writes, how it goes on after an interruption, and what it refuses."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from toy import byte_level, toy_config

import h1bjax
import train.loop
from h1bjax.cache import CacheSpec
from h1bjax.config import LlamaConfig
from h1bjax.evaluate import perplexity
from train.checkpoint import Checkpoints
from train.folder import JobFolder
from train.job import run
from train.log import LogRow, append_log, read_log, write_log
from train.options import Job
from train.step import train_step

TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 12
FROM_MODEL = {"init": None, "tokenizer": None, "model": "somewhere", "cache": "h1b-paper"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A configuration, a tokenizer, a text and another one."""
    folder = tmp_path_factory.mktemp("files")
    config = toy_config(max_position_embeddings=64, tie_word_embeddings=True).to_hf()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer").mkdir()
    byte_level().save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "text.txt").write_text(TEXT)
    (folder / "valid.txt").write_text("the log sat on the cat.\n" * 4)
    return folder


def small_job(files, out, **options):
    return Job(
        **{
            "text": (files / "text.txt",),
            "out": out,
            "steps": 7,
            "init": files / "config.json",
            "tokenizer": files / "tokenizer",
            "batch": 4,
            "context": 16,
            "learning_rate": 0.01,
            "warmup": 2,
            "dtype": "float32",
            "checkpoint_every": 2,
            **options,
        }
    )


@pytest.fixture
def job(files, tmp_path):
    return small_job(files, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The same job run without interruption, with a validation text, and its outcome."""
    out = tmp_path_factory.mktemp("finished") / "out"
    job = small_job(files, out, valid=(files / "valid.txt",))
    return job, run(job)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_writes_a_model_that_loads_a_log_and_a_picture(finished, files):
    job, outcome = finished
    model = h1bjax.load(outcome.model, cache="exact")
    assert model.config == LlamaConfig.from_hf(files / "config.json")
    assert model.generate("the cat", max_new_tokens=3).text is not None
    rows = read_log(job.out / "log.csv")
    assert [row.step for row in rows] == [2, 4, 6, 7]
    losses = [row.loss for row in rows]
    assert losses[-1] < losses[0]
    assert outcome.loss == losses[-1]
    assert rows[-1].learning_rate == pytest.approx(0.001)
    assert all(row.tokens_per_second is not None and row.tokens_per_second > 0 for row in rows)
    assert (job.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    with Checkpoints(job.out / "checkpoints") as checkpoints:
        assert checkpoints.latest == 7


def test_evaluates_the_model_that_it_wrote(finished, files):
    job, outcome = finished
    model = h1bjax.load(outcome.model, cache="exact")
    expected = perplexity(model, [(files / "valid.txt").read_text()], context=16)
    assert outcome.evaluations["exact"].bits_per_byte == pytest.approx(
        expected.bits_per_byte, rel=1e-5
    )
    written = json.loads((job.out / "evaluation.json").read_text())
    assert written["caches"]["exact"]["bits_per_byte"] == outcome.evaluations["exact"].bits_per_byte
    assert written["caches"]["exact"]["tokens"] == expected.tokens


def test_transformers_loads_the_model(finished):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = finished[1].model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = h1bjax.load(folder, cache="exact")
    tokens = list(range(3, 20))
    expected = theirs(torch.tensor([tokens])).logits.detach().numpy()
    found, _ = ours.decoder(jnp.array([tokens]), None)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_interrupted_job_goes_on_to_the_same_weights(finished, job, monkeypatch):
    taken = []

    def interrupted(state, *rest):
        taken.append(int(state.step))
        if len(taken) == 6:
            raise KeyboardInterrupt
        return train_step(state, *rest)

    monkeypatch.setattr(train.loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert not (job.out / "model").exists()
    # Killed in the middle of a row.
    with (job.out / "log.csv").open("a") as file:
        file.write("5,3.1")

    outcome = run(job)
    assert taken == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    uninterrupted = finished[1].model
    assert weights(outcome.model) == weights(uninterrupted)
    steps = [(row.step, row.loss) for row in read_log(job.out / "log.csv")]
    assert steps == [(row.step, row.loss) for row in read_log(uninterrupted.parent / "log.csv")]


def test_a_finished_job_does_nothing_again(finished, monkeypatch):
    job, outcome = finished
    before = weights(outcome.model)
    monkeypatch.setattr(train.loop, "train_step", None)
    again = run(job)
    assert again.loss == outcome.loss
    assert weights(again.model) == before


def test_a_job_interrupted_while_it_exported_exports(finished, tmp_path):
    job, outcome = finished
    copy = replace(job, out=tmp_path / "copy", valid=())
    shutil.copytree(job.out, copy.out)
    shutil.move(copy.out / "model", copy.out / "model.partial")
    (copy.out / "model.partial" / "config.json").unlink()
    assert weights(run(copy).model) == weights(outcome.model)
    assert not (copy.out / "model.partial").exists()


@pytest.mark.once
def test_begins_from_a_models_weights(job, toy_folder):
    start = replace(
        job,
        init=None,
        tokenizer=None,
        model=str(toy_folder),
        steps=1,
        learning_rate=1e-6,
        warmup=0,
        weight_decay=0.0,
    )
    outcome = run(start)
    before = h1bjax.load(toy_folder, cache="exact")
    after = h1bjax.load(outcome.model, cache="exact")
    assert after.tokenizer is not None
    assert after.tokenizer.eos_token_id == 2
    for name, array in after.decoder.parameters().items():
        moved = np.abs(array - before.decoder.parameters()[name]).max()
        assert 0 < moved < 1e-5, name


def change_weights(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["model.embed_tokens.weight"] *= 1.5
    save_file(arrays, folder / "model.safetensors", metadata={"format": "np"})


@pytest.mark.once
def test_weights_that_changed_under_the_same_path_are_another_job(job, toy_folder, tmp_path):
    source, teacher = tmp_path / "source", tmp_path / "teacher"
    for folder in (source, teacher):
        shutil.copytree(toy_folder, folder)
    begun = {"init": None, "tokenizer": None, "steps": 1, "warmup": 0}
    start = replace(job, model=str(source), teacher=str(teacher), **begun)
    loss = run(start).loss
    # The same weights under another path are the same job.
    assert run(replace(start, model=str(toy_folder))).loss == loss
    change_weights(teacher)
    with pytest.raises(ValueError, match=r"another training job.*: teacher is"):
        run(start)
    change_weights(source)
    with pytest.raises(ValueError, match=r"another training job.*begin is .*teacher is"):
        run(start)


@pytest.mark.once
def test_imitates_the_teacher_that_is_named(job, toy_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(toy_folder, other)
    change_weights(other)
    start = replace(job, init=None, tokenizer=None, model=str(toy_folder), steps=1, warmup=0)
    divergences = []
    for teacher in (toy_folder, other):
        out = tmp_path / f"taught by {teacher.name}"
        taught = replace(start, out=out, teacher=str(teacher))
        run(taught)
        (row,) = read_log(out / "log.csv")
        assert row.divergence is not None
        divergences.append(row.divergence)
    assert divergences[0] == pytest.approx(0, abs=1e-5)
    assert divergences[1] > 1e-3


def test_a_teacher_of_another_kind_is_refused(job, toy_folder, tmp_path):
    start = replace(job, init=None, tokenizer=None, model=str(toy_folder))
    other = tmp_path / "other"
    shutil.copytree(toy_folder, other)
    config = json.loads((other / "config.json").read_text())
    described = config | {"rms_norm_eps": 0.5, "torch_dtype": "float16"}
    (other / "config.json").write_text(json.dumps(described))
    named = f"the teacher {other} is not of the model's shape: rms_norm_eps 0.5 instead of 1e-"
    with pytest.raises(ValueError, match=re.escape(named)):
        run(replace(start, teacher=str(other)))
    (other / "config.json").write_text(json.dumps(config))
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="has another tokenizer than the model"):
        run(replace(start, teacher=str(other)))
    assert not job.out.exists()


@pytest.mark.slow
def test_trains_for_a_cache_on_a_mesh_and_writes_its_calibration(job, toy_folder):
    mesh = f"batch={len(jax.devices()) // 2},tensor=2" if len(jax.devices()) > 1 else None
    spec = CacheSpec.preset("h1b-2plane-v2")
    trained = replace(
        job,
        init=None,
        tokenizer=None,
        model=str(toy_folder),
        cache=spec.name,
        trained="lora",
        rank=2,
        context=70,
        steps=2,
        mesh=mesh,
    )
    outcome = run(trained)
    rows = read_log(trained.out / "log.csv")
    assert rows[-1].divergence is not None
    assert rows[-1].divergence > 0
    before, after = (h1bjax.load(folder, cache="exact") for folder in (toy_folder, outcome.model))
    moved = {
        name
        for name, array in after.decoder.parameters().items()
        if np.any(array != before.decoder.parameters()[name])
    }
    assert moved == {"query", "key", "value", "output", "gate", "up", "down"}
    # No warning, so it was calibrated.
    h1bjax.load(outcome.model, cache=spec)
    described = json.loads((outcome.model / "calibration" / f"{spec.name}.json").read_text())
    assert described["text"]["files"].keys() == {"text.txt"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"learning_rate": 0.02}, "learning_rate is 0.01 there, 0.02 here"),
        ({"steps": 8}, "steps is 7 there, 8 here"),
        ({"batch": 2, "context": 8}, "batch is 4 there, 2 here; context is 16 there, 8 here"),
    ],
)
def test_the_folder_of_another_job_is_left_alone(finished, change, named):
    job, outcome = finished
    before = weights(outcome.model)
    with pytest.raises(ValueError, match=f"holds another training job.*{named}"):
        run(replace(job, **change))
    assert weights(outcome.model) == before


def test_another_text_is_another_job(finished, files, tmp_path):
    job, _ = finished
    other = tmp_path / "text.txt"
    other.write_text(TEXT + "x")
    with pytest.raises(ValueError, match=r"another training job.*text is"):
        run(replace(job, text=(other,)))
    # The same text under another name is the same job.
    other.write_text(TEXT)
    assert run(replace(job, text=(other,), valid=())).evaluations == {}


def test_a_folder_with_other_content_is_refused(job):
    job.out.mkdir()
    (job.out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no training job"):
        run(job)
    assert [file.name for file in job.out.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(job):
    job.out.write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        run(job)


def test_a_text_shorter_than_a_window_is_refused_and_leaves_nothing(job, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(ValueError, match="2 tokens, fewer than the 17 of one window"):
        run(replace(job, text=(short,)))
    assert not job.out.exists()


def test_missing_files_are_named_together(job, tmp_path):
    absent = replace(job, text=(tmp_path / "a.txt", *job.text), valid=(tmp_path / "b.txt",))
    with pytest.raises(FileNotFoundError, match=r"a\.txt, .*b\.txt"):
        run(absent)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        run(replace(job, init=tmp_path / "config.json"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(replace(job, tokenizer=tmp_path / "absent"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(job, tmp_path, files):
    config = json.loads((files / "config.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="261 tokens, more than the model's vocabulary of 100"):
        run(replace(job, init=tmp_path / "small.json"))


def test_a_context_beyond_the_models_is_refused(job):
    with pytest.raises(ValueError, match="context=65 exceeds the 64 tokens"):
        run(replace(job, context=65))


def test_two_ends_of_text_are_refused(job, files, tmp_path):
    config = json.loads((files / "config.json").read_text()) | {"eos_token_id": 5}
    (tmp_path / "other.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"token 2, and the model's configuration with \[5\]"):
        run(replace(job, init=tmp_path / "other.json"))


def test_a_text_without_an_end_is_refused(job, files, tmp_path):
    config = json.loads((files / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "endless.json").write_text(json.dumps(config))
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="names a token that ends a text"):
        run(replace(job, init=tmp_path / "endless.json", tokenizer=tmp_path))


def test_bad_options_are_listed_together(files, tmp_path):
    listed = (
        "steps=0 must be at least 1; warmup=-1 must be at least 0; learning_rate=nan must be "
        "positive; weight_decay=-0.1 must not be negative; batch=4 must be a multiple of 3 parts; "
        "dtype='float16' must be bfloat16 or float32"
    )
    with pytest.raises(ValueError, match=f"^{listed}$"):
        small_job(
            files,
            tmp_path,
            steps=0,
            warmup=-1,
            learning_rate=float("nan"),
            weight_decay=-0.1,
            microbatches=3,
            dtype="float16",
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "somewhere"}, "either a config.json for random weights or a model"),
        ({"init": None, "tokenizer": None}, "either a config.json for random weights or a model"),
        ({"init": None, "model": "somewhere"}, "a tokenizer belongs to random weights"),
        ({"tokenizer": None}, "a tokenizer belongs to random weights"),
        ({"warmup": 8}, "warmup=8 exceeds the 7 steps"),
        ({"cache": "h1b"}, "random weights train as a whole, and without a cache"),
        ({"trained": "lora"}, "random weights train as a whole"),
        ({"distillation": 1.0}, "random weights have nothing to teach"),
        ({"teacher": "somewhere"}, "a teacher belongs to a model that begins from weights"),
        (
            {"init": None, "tokenizer": None, "model": "a", "teacher": "b", "distillation": 0.0},
            "a teacher .* teaches by a distillation above 0",
        ),
        ({"next_token": 0.0}, "next_token and distillation must not both be 0"),
        ({"trained": "decoders"}, "decoders belong to a cache; name one"),
        ({"rank": 3}, "rank=3 belongs to 'lora'"),
        ({**FROM_MODEL, "trained": "decoders"}, "0.01 is that of weights, .* set codec_rate"),
        ({**FROM_MODEL, "trained": "temperatures"}, "0.01 is that of weights, .* set codec_rate"),
        ({**FROM_MODEL, "cache": None, "codec_rate": 0.1}, "codec, and the cache 'exact' has none"),
        ({"codec_rate": 0.1}, "codec_rate=0.1 is that of a key codec"),
    ],
)
def test_options_that_do_not_go_together_are_refused(job, change, message):
    with pytest.raises(ValueError, match=message):
        replace(job, **change)


def test_a_loss_that_is_not_finite_stops_the_job_and_is_not_saved(job, monkeypatch):
    def spoiled(state, *rest):
        state, metrics = train_step(state, *rest)
        spoils = int(state.step) == 5
        return state, replace(metrics, gradient_norm=jnp.nan) if spoils else metrics

    monkeypatch.setattr(train.loop, "train_step", spoiled)
    told = r"step 5 has .* norm nan; step 4 is kept\. .* in another folder, with a smaller learning"
    with pytest.raises(FloatingPointError, match=told):
        run(job)
    with Checkpoints(job.out / "checkpoints") as checkpoints:
        assert checkpoints.latest == 4
    assert not (job.out / "model").exists()


def test_a_save_that_fails_before_such_a_loss_is_read_is_not_said_to_be_kept(job, monkeypatch):
    wait = ocp.CheckpointManager.wait_until_finished
    failures = []

    def spoiled(state, *rest):
        state, metrics = train_step(state, *rest)
        if int(state.step) != 5:
            return state, metrics
        failures.append(ValueError("no space"))
        return state, replace(metrics, gradient_norm=jnp.nan)

    def failing(manager):
        wait(manager)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(train.loop, "train_step", spoiled)
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", failing)
    with pytest.raises(OSError, match=r"step 4 could not be saved; step 2 is kept") as caught:
        run(job)
    # Nothing was raised, and told, before it.
    failure = caught.value.__cause__
    assert isinstance(failure, ValueError)
    assert failure.__context__ is None


def test_every_row_that_saves_nothing_looks_whether_the_last_save_has_ended(job, monkeypatch):
    rows = []
    monkeypatch.setattr(train.loop, "LOG_EVERY", 1)
    monkeypatch.setattr(Checkpoints, "list_finished", lambda self: rows.append(self.latest))
    run(job)
    assert rows == [None, 2, 4]


@pytest.mark.once
def test_a_diverging_job_says_where(job):
    with pytest.raises(FloatingPointError, match=r"step 2 has .*there is no checkpoint yet"):
        run(replace(job, learning_rate=1e30, warmup=0))


def test_a_log_survives_a_cut_and_refuses_other_files(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    assert read_log(path) == []
    rows = [LogRow(10, 2.5, None, 1e-3, None), LogRow(20, 1 / 3, 0.5, 1e-4, 1234.5)]
    write_log(path, rows[:1])
    append_log(path, rows[1])
    assert read_log(path) == rows
    path.write_text(path.read_text() + "30,0.")
    assert read_log(path) == rows
    # Cut off while it is written anew.
    monkeypatch.setattr("train.log.astuple", None)
    with pytest.raises(TypeError):
        write_log(path, rows[:1])
    assert read_log(path) == rows
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not the log of a training"):
        read_log(path)


def test_a_record_that_is_cut_off_is_refused(tmp_path):
    (tmp_path / "job.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"job\.json is not valid JSON"):
        JobFolder(tmp_path).check({"seed": 0})
