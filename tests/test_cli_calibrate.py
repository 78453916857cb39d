"""`h1bjax calibrate`: what it writes and where, and what it refuses before any work."""

import gzip
import json
import re
import shutil
import sys

import numpy as np
import pytest
from calibrations import random_calibration
from test_cli import assert_error
from toy import byte_level, readable, write_toy

import h1bjax
import h1bjax.calibrate
import h1bjax.cli.calibrate
from h1bjax import cli
from h1bjax.cache import CacheSpec
from h1bjax.calibration_file import calibrated_names, find_calibration
from h1bjax.checkpoint import save_pretrained
from h1bjax.config import LlamaConfig

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("default")]


@pytest.fixture
def folder(toy_folder, tmp_path):
    """A model that may be written beside."""
    return shutil.copytree(toy_folder, tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    """Two files of sample text."""
    (tmp_path / "one.txt").write_text("Once upon a time there was the end. " * 20)
    with gzip.open(tmp_path / "two.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "And then the other end. " * 20}) + "\n")
    return [tmp_path / "one.txt", tmp_path / "two.jsonl.gz"]


@pytest.fixture
def run(capfd):
    """Runs `h1bjax calibrate`; returns its exit code, stdout and stderr."""

    def run(model, out, text, *options, caches=("h1b",)):
        arguments = ["calibrate", "--model", model, "--out", out, "--text", *text]
        arguments += [argument for name in caches for argument in ("--cache", name)]
        code = cli.main([str(argument) for argument in (*arguments, *options)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def fitted(monkeypatch):
    """Replaces the fit by random numbers; the list holds what each fit was asked for."""
    asked = []

    def calibrate(decoder, windows, specs, *, seed=0, batch=8):
        asked.append((decoder, windows, seed, batch))
        return [random_calibration(spec, seed, decoder.config) for spec in specs]

    monkeypatch.setattr(h1bjax.calibrate, "calibrate", calibrate)
    return asked


@pytest.fixture
def unloaded(monkeypatch):
    """Fails the test if weights are loaded."""

    def load_parameters(*_):
        pytest.fail("weights were loaded before the mistake was found")

    monkeypatch.setattr("h1bjax.checkpoint.load_parameters", load_parameters)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


SMALL = ("--tokens", "320", "--context", "80", "--batch", "2")


# What is written


def test_calibration_fits_a_model_that_loads_without_a_warning(run, folder, text, tmp_path):
    out_folder = tmp_path / "out"
    code, _, err = run(folder, out_folder, text, *SMALL)
    assert code == 0, err
    model = h1bjax.load(out_folder, cache="h1b")
    assert len(model.generate("the end", max_new_tokens=3).tokens[0]) == 3
    # Keys of real text are not centred on zero, which only a fit can know.
    assert model.decoder.codec is not None
    assert np.abs(model.decoder.codec.mean[...]).max() > 0


def test_a_new_folder_gets_the_model_byte_for_byte(run, fitted, folder, text, tmp_path):
    (folder / "generation_config.json").write_text("{}")
    (folder / "notes.md").write_text("not part of the model")
    out_folder = tmp_path / "deep" / "out"
    code, out, err = run(folder, out_folder, text, *SMALL, "--seed", "7")
    assert code == 0, err
    arrays = out_folder / "calibration" / "h1b.safetensors"
    assert re.fullmatch(rf"{re.escape(str(arrays))}: h1b, 320 tokens, \d+\.\d s\n", out)
    copied, source = contents(out_folder), contents(folder)
    del source["notes.md"]
    assert {name: copied[name] for name in source} == source
    assert copied.keys() - source.keys() == {"calibration/h1b.json", "calibration/h1b.safetensors"}
    ((decoder, windows, seed, batch),) = fitted
    assert (windows.shape, seed, batch) == ((4, 80), 7, 2)
    assert decoder.spec == CacheSpec.preset("exact")
    described = json.loads(copied["calibration/h1b.json"])["text"]
    assert described["files"].keys() == {"one.txt", "two.jsonl.gz"}
    assert (described["tokens"], described["context"], described["seed"]) == (320, 80, 7)


def test_shards_are_copied_with_their_index(run, fitted, folder, text, tmp_path):
    source = tmp_path / "shards"
    parameters = h1bjax.load(folder, cache="exact").decoder.parameters()
    config = LlamaConfig.from_hf(folder)
    save_pretrained(source, config, parameters, max_shard_bytes=30_000, source=folder)
    assert run(source, tmp_path / "out", text, *SMALL)[0] == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert find_calibration(tmp_path / "out", CacheSpec.preset("h1b")) is not None


def test_several_presets_share_one_pass(run, fitted, folder, text, tmp_path):
    code, out, _ = run(folder, tmp_path / "out", text, *SMALL, caches=["h1b", "h1b-v2"])
    assert (code, len(fitted)) == (0, 1)
    assert [line.split(": ")[1][:7] for line in out.splitlines()] == ["h1b, 32", "h1b-v2,"]
    assert calibrated_names(tmp_path / "out") == ["h1b", "h1b-v2"]


def test_the_models_own_folder_gets_only_the_calibration(run, fitted, folder, text):
    before = contents(folder)
    assert run(folder, folder, text, *SMALL)[0] == 0
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"calibration/h1b.json", "calibration/h1b.safetensors"}


def test_an_empty_folder_is_as_good_as_a_new_one(run, fitted, folder, text, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(folder, tmp_path / "out", text, *SMALL)[0] == 0
    h1bjax.load(tmp_path / "out", cache="h1b")


def test_another_preset_is_added_to_an_earlier_output(run, fitted, folder, text, tmp_path):
    assert run(folder, tmp_path / "out", text, *SMALL)[0] == 0
    before = contents(tmp_path / "out")
    assert run(folder, tmp_path / "out", text, *SMALL, caches=["h1b-v2"])[0] == 0
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert calibrated_names(tmp_path / "out") == ["h1b", "h1b-v2"]


@pytest.mark.parametrize(("longest", "context"), [(96, 96), (4096, 2048)])
def test_windows_are_as_long_as_the_model_reads_up_to_2048(run, fitted, tmp_path, longest, context):
    folder = write_toy(tmp_path / "m", byte_level(), readable, max_position_embeddings=longest)
    (tmp_path / "long.txt").write_text("the end and so on. " * 400)
    options = ("--tokens", str(context))
    assert run(folder, tmp_path / "out", [tmp_path / "long.txt"], *options)[0] == 0
    assert fitted[0][1].shape == (1, context)


def test_the_dtype_is_the_checkpoints_unless_chosen(run, fitted, folder, text, tmp_path):
    assert run(folder, tmp_path / "a", text, *SMALL)[0] == 0
    assert run(folder, tmp_path / "b", text, *SMALL, "--dtype", "bfloat16")[0] == 0
    assert [str(decoder.dtype) for decoder, *_ in fitted] == ["float32", "bfloat16"]
    # The weights that are written are the checkpoint's all the same.
    assert h1bjax.load(tmp_path / "b", cache="h1b").decoder.dtype == np.float32


# Bad input, found before any work


@pytest.mark.parametrize(
    ("caches", "options", "message"),
    [
        (["h2b"], [], "unknown cache preset 'h2b'; choose one of exact"),
        (["exact"], [], "nothing to calibrate in the cache exact"),
        (["kivi-2", "h1b", "sinks-window"], [], "nothing .* cache kivi-2, sinks-window"),
        (["h1b", "h1b"], [], "--cache names twice: h1b"),
        (["h1b"], ["--context", "2000"], "--context 2000 exceeds the 1024 tokens"),
        (["h1b"], ["--context", "64"], "--context 64 lies within the 64 tokens .* 'h1b' keeps"),
        (["h1b"], ["--tokens", "63"], "--tokens 63 is less than one window of 80"),
        (["h1b"], ["--tokens", "0"], "--tokens: '0' is not a whole number"),
        (["h1b"], ["--dtype", "int8"], "--dtype: invalid choice"),
    ],
)
def test_bad_options_are_one_line(run, unloaded, folder, text, tmp_path, caches, options, message):
    assert_error(run(folder, tmp_path / "out", text, *SMALL, *options, caches=caches), message)
    assert not (tmp_path / "out").exists()


def test_missing_text_files_are_all_named(run, unloaded, folder, text, tmp_path):
    files = [tmp_path / "no.txt", *text, tmp_path / "nor.jsonl"]
    assert_error(run(folder, tmp_path / "out", files, *SMALL), r"no\.txt, .*nor\.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty.txt has no text"),
        (b"caf\xe9", "not UTF-8"),
        (b"too short", "fewer than one window of 80"),
    ],
    ids=["empty", "latin-1", "short"],
)
def test_text_that_is_not_enough_is_refused(run, unloaded, folder, tmp_path, content, message):
    (tmp_path / "empty.txt").write_bytes(content)
    assert_error(run(folder, tmp_path / "out", [tmp_path / "empty.txt"], *SMALL), message)
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_installed_is_named(run, unloaded, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "text.txt.zst").write_bytes(b"")
    result = run(folder, tmp_path / "out", [tmp_path / "text.txt.zst"], *SMALL)
    assert_error(result, "pip install zstandard")


def test_a_model_that_is_not_there_is_named(run, unloaded, text, tmp_path):
    assert_error(run(tmp_path / "none", tmp_path / "out", text, *SMALL), "none")


def test_a_model_without_a_tokenizer_is_refused(run, unloaded, untokenized_folder, text, tmp_path):
    assert_error(run(untokenized_folder, tmp_path / "out", text, *SMALL), "tokenizer")


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(run, unloaded, text, tmp_path):
    folder = write_toy(tmp_path / "m", byte_level(), vocab_size=100)
    assert_error(run(folder, tmp_path / "out", text, *SMALL), "vocabulary has 100")


def test_a_sliding_window_bounds_the_context(run, unloaded, text, tmp_path):
    keys = {"model_type": "mistral", "sliding_window": 48}
    folder = write_toy(tmp_path / "m", byte_level(), **keys)
    assert_error(run(folder, tmp_path / "out", text, *SMALL), "exceeds the 48 tokens")


def test_a_head_that_the_codec_does_not_take_is_refused(
    run, unloaded, folder, text, tmp_path, monkeypatch
):
    narrow = CacheSpec.preset("h1b").replace(name="narrow", keys=h1bjax.cache.OrthogonalSigns(40))
    monkeypatch.setattr(CacheSpec, "preset", lambda name: narrow)
    assert_error(run(folder, tmp_path / "out", text, *SMALL), "40 bits does not pack")


# Nothing is overwritten


def test_a_folder_of_other_things_is_refused(run, unloaded, folder, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert_error(run(folder, tmp_path / "out", text, *SMALL), "neither empty nor a model's folder")
    assert contents(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_a_file_is_no_destination(run, unloaded, folder, text, tmp_path):
    (tmp_path / "out").write_text("years of work")
    assert_error(run(folder, tmp_path / "out", text, *SMALL), "out is a file")
    assert_error(run(folder, tmp_path / "out" / "in", text, *SMALL), "cannot be written")
    assert (tmp_path / "out").read_text() == "years of work"


def test_another_model_is_no_destination(run, unloaded, folder, text, tmp_path):
    other = write_toy(tmp_path / "other", byte_level())
    before = contents(other)
    assert_error(run(folder, other, text, *SMALL), "other holds another model than .*model")
    # The same weights under another config are another model too.
    twin = shutil.copytree(folder, tmp_path / "twin")
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert_error(run(folder, twin, text, *SMALL), "twin holds another model")
    assert contents(other) == before


def test_a_preset_that_is_calibrated_there_is_refused(run, fitted, folder, text, tmp_path):
    assert run(folder, tmp_path / "out", text, *SMALL)[0] == 0
    before = contents(tmp_path / "out")
    result = run(folder, tmp_path / "out", text, *SMALL, caches=["h1b-v2", "h1b"])
    assert_error(result, r"nothing is overwritten, and there is .*h1b\.json")
    assert contents(tmp_path / "out") == before
    assert len(fitted) == 1


def test_calibrations_of_other_weights_in_the_folder_are_refused(run, fitted, folder, text):
    other = write_toy(folder.parent / "other", byte_level())
    assert run(other, other, text, *SMALL)[0] == 0
    shutil.copytree(other / "calibration", folder / "calibration")
    before = contents(folder)
    assert_error(run(folder, folder, text, *SMALL, caches=["h1b-v2"]), "made for other weights")
    assert contents(folder) == before
    assert len(fitted) == 1


# Failures after the work has begun


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_fit_that_fails_leaves_nothing(run, fitted, folder, text, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(h1bjax.calibrate, "calibrate", fail)
        assert run(folder, tmp_path / "out", text, *SMALL)[0] in (2, 130)
    assert not (tmp_path / "out").exists()
    assert run(folder, tmp_path / "out", text, *SMALL)[0] == 0


def test_a_copy_that_fails_takes_back_what_it_wrote(
    run, fitted, folder, text, tmp_path, monkeypatch
):
    copyfile, copied = shutil.copyfile, []

    def fail(source, target):
        if target.name == "tokenizer.json":
            raise OSError("no space left")
        copied.append(copyfile(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        assert_error(run(folder, tmp_path / "out", text, *SMALL), "no space left")
    assert copied
    assert contents(tmp_path / "out") == {}
    assert run(folder, tmp_path / "out", text, *SMALL)[0] == 0


def test_a_calibration_that_is_not_finite_is_not_saved(run, folder, text, monkeypatch):
    def calibrate(decoder, windows, specs, *, seed=0, batch=8):
        (calibration,) = [random_calibration(spec) for spec in specs]
        calibration.codec.mean[...] = calibration.codec.mean[...] * np.nan
        return [calibration]

    monkeypatch.setattr(h1bjax.calibrate, "calibrate", calibrate)
    before = contents(folder)
    assert_error(run(folder, folder, text, *SMALL), "not finite: mean")
    assert contents(folder) == before


# convert


def test_convert_says_that_calibrations_are_left_behind(run, fitted, folder, text, tmp_path, capfd):
    assert run(folder, folder, text, *SMALL)[0] == 0
    assert cli.main(["convert", "--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    err = capfd.readouterr().err
    assert re.fullmatch(r"h1bjax: warning: calibrations are not copied, .*: h1b; .*\n", err)
    assert not (tmp_path / "out" / "calibration").exists()
