"""Calibrations beside the weights: saved, found again, used, and refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrations import TEXT, random_calibration
from flax import nnx
from safetensors.numpy import load_file, save_file
from toy import byte_level, write_toy

import h1bjax
from h1bjax import calibration_file
from h1bjax.cache import PRESETS, CacheSpec, LinearCode
from h1bjax.cache.keys import KeyCodec
from h1bjax.calibrate import Calibration, calibrate
from h1bjax.calibration_file import (
    CalibrationText,
    calibrated_names,
    calibration_path,
    check_calibrations,
    find_calibration,
    is_calibratable,
    needs_calibration,
    save_calibration,
)
from h1bjax.checkpoint import save_pretrained
from h1bjax.config import LlamaConfig
from h1bjax.fingerprint import weights_fingerprint

pytestmark = pytest.mark.once

H1B = CacheSpec.preset("h1b")
ROTATED = CacheSpec.preset("h1b-v2")
FITTED = H1B.replace(name="fitted", keys=LinearCode(2.0), scores="fitted", rope_period=32)


@pytest.fixture
def folder(toy_folder, tmp_path):
    """A model that may be changed."""
    return shutil.copytree(toy_folder, tmp_path / "model")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(folder, name, **changes):
    path = calibration_path(folder, name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_arrays(folder, name, change):
    """Changes the array file, and its hash with it."""
    path = calibration_path(folder, name).with_suffix(".safetensors")
    save_file(change(load_file(path)), path)
    edit(folder, name, arrays_sha256=calibration_file.file_sha256(path))


def found(folder, spec):
    """The calibration that must be there."""
    calibration = find_calibration(folder, spec)
    assert calibration is not None
    return calibration


def codec(model):
    assert model.decoder.codec is not None
    return model.decoder.codec


def assert_equal(ours, theirs):
    np.testing.assert_array_equal(ours.rotation, theirs.rotation)
    jax.tree.map(np.testing.assert_array_equal, ours.codec, theirs.codec)


# What can be calibrated


def test_sketched_keys_and_rotated_values_are_calibrated():
    assert not is_calibratable(CacheSpec.preset("exact"))
    assert not is_calibratable(CacheSpec.preset("kivi-2"))
    assert not is_calibratable(CacheSpec.preset("sinks-window"))
    assert is_calibratable(H1B)
    assert is_calibratable(CacheSpec("values", values=ROTATED.values))


def test_codes_of_data_need_a_calibration():
    assert needs_calibration(H1B)
    assert needs_calibration(FITTED)
    for name in ("exact", "h1b-paper", "h1b-signs", "h1b-2plane-v2", "kivi-2"):
        assert not needs_calibration(CacheSpec.preset(name)), name
    assert not needs_calibration(CacheSpec.preset("h1b-signs").replace(scores="fitted"))


# Round trips


@pytest.mark.parametrize("spec", [H1B, ROTATED, FITTED], ids=lambda spec: spec.name)
def test_what_is_saved_is_found(folder, spec):
    calibration = random_calibration(spec)
    path = save_calibration(folder, calibration, TEXT)
    assert path == folder / "calibration" / f"{spec.name}.safetensors"
    assert found(folder, spec).spec == spec
    assert_equal(found(folder, spec), calibration)


def test_what_calibration_fits_to_each_codec_is_saved(folder):
    specs = [FITTED, *(PRESETS[name] for name in ("h1b-paper", "h1b", "h1b-2plane-v2"))]
    windows = np.random.default_rng(0).integers(3, 100, (2, 80), np.int32)
    decoder = h1bjax.load(folder, cache="exact").decoder
    for calibration in calibrate(decoder, windows, specs):
        save_calibration(folder, calibration, TEXT)
        assert_equal(found(folder, calibration.spec), calibration)


def test_rotated_values_alone_are_a_calibration(folder):
    spec = CacheSpec("values", values=ROTATED.values)
    calibration = random_calibration(spec)
    assert calibration.codec is None
    save_calibration(folder, calibration, TEXT)
    assert found(folder, spec).codec is None
    np.testing.assert_array_equal(found(folder, spec).rotation, calibration.rotation)


@pytest.mark.parametrize("name", [name for name in PRESETS if is_calibratable(PRESETS[name])])
def test_every_preset_survives_its_description(folder, name):
    save_calibration(folder, random_calibration(PRESETS[name]), TEXT)
    assert found(folder, PRESETS[name]).spec == PRESETS[name]


def test_every_codec_of_keys_can_be_described():
    known = {
        codec for codec in KeyCodec.__subclasses__() if codec.__module__ == KeyCodec.__module__
    }
    assert known <= {*calibration_file._CODECS.values()}


def test_the_description_says_what_it_belongs_to(folder, tmp_path):
    (tmp_path / "book.txt").write_bytes(b"abc")
    windows = np.arange(12, dtype=np.int32).reshape(3, 4)
    text = CalibrationText.of([tmp_path / "book.txt"], windows, seed=5)
    save_calibration(folder, random_calibration(FITTED), text)
    path = calibration_path(folder, "fitted")
    described = json.loads(path.read_text())
    assert described.pop("versions").keys() == {"h1bjax", "jax", "flax"}
    assert len(described.pop("arrays_sha256")) == 64
    tokens_sha256 = described["text"].pop("tokens_sha256")
    assert described == {
        "format": 1,
        "cache": {
            "name": "fitted",
            "keys": {"codec": "LinearCode", "rate": 2.0, "scaled": True},
            "values": {"codec": "QuantisedValues", "bits": 4, "rotated": False, "group": None},
            "sinks": 4,
            "window": 60,
            "scores": "fitted",
            "rope_period": 32,
            "evict": False,
        },
        "weights": weights_fingerprint(folder),
        "text": {
            "files": {
                "book.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
            },
            "tokens": 12,
            "context": 4,
            "seed": 5,
        },
    }
    other = CalibrationText.of([tmp_path / "book.txt"], windows[::-1], seed=5)
    assert other.tokens_sha256 != tokens_sha256


LINEAR = {
    "transform": (2, 2, 32, 32),
    "levels": (2, 2, 32),
    "weight": (2, 2, 32),
    "metric": (2, 2, 32, 32),
}


@pytest.mark.parametrize(("name", "more"), [("h1b-signs-v2", {}), ("h1b-v2", LINEAR)])
def test_arrays_are_float32_by_the_names_of_the_fields(folder, name, more):
    calibration = random_calibration(CacheSpec.preset(name))
    arrays = load_file(save_calibration(folder, calibration, TEXT))
    assert {name: array.shape for name, array in arrays.items()} == {
        "projection": (2, 2, 32, 32),
        "mean": (2, 2, 32),
        "temperature": (2, 4),
        "offset": (2, 4),
        "value_rotation": (2, 2, 32, 32),
        **more,
    }
    assert {str(array.dtype) for array in arrays.values()} == {"float32"}


# Finding the one that fits


def test_a_model_without_calibrations_has_none(folder):
    assert find_calibration(folder, H1B) is None
    assert calibrated_names(folder) == []
    (folder / "calibration").mkdir()
    assert find_calibration(folder, H1B) is None


@pytest.mark.parametrize(
    "change",
    [
        {"sinks": 5},
        {"window": 61},
        {"scores": "fitted"},
        {"rope_period": 32},
        {"values": ROTATED.values},
        {"keys": CacheSpec.preset("h1b-2plane").keys},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_cache_has_none(folder, change):
    save_calibration(folder, random_calibration(H1B), TEXT)
    assert find_calibration(folder, H1B.replace(**change)) is None


def test_the_name_decides_only_among_those_that_fit(folder):
    calibrations = {
        name: random_calibration(H1B.replace(name=name), seed)
        for seed, name in enumerate(["b", "a"])
    }
    for calibration in calibrations.values():
        save_calibration(folder, calibration, TEXT)
    assert calibrated_names(folder) == ["a", "b"]
    for wanted, taken in [("a", "a"), ("b", "b"), ("h1b", "a")]:
        assert_equal(found(folder, H1B.replace(name=wanted)), calibrations[taken])


def test_a_field_that_an_older_version_did_not_write_has_its_default(folder):
    save_calibration(folder, random_calibration(H1B), TEXT)
    described = json.loads(calibration_path(folder, "h1b").read_text())["cache"]
    del described["rope_period"]
    edit(folder, "h1b", cache=described)
    assert found(folder, H1B).spec == H1B


# Refused when loading


def test_a_calibration_of_other_weights_is_refused(folder):
    save_calibration(folder, random_calibration(H1B), TEXT)
    save_calibration(folder, random_calibration(ROTATED), TEXT)
    other = write_toy(folder.parent / "other", byte_level())
    shutil.copytree(folder / "calibration", other / "calibration")
    for spec in (H1B, ROTATED, FITTED):
        with pytest.raises(ValueError, match=r"h1b-v2\.json was made for other weights") as caught:
            find_calibration(other, spec)
        assert "h1b.json was made for other weights than those in" in str(caught.value)
    with pytest.raises(ValueError, match="other weights"):
        h1bjax.load(other, cache="h1b")
    with pytest.raises(ValueError, match="other weights"):
        check_calibrations(other)
    # A cache that needs no calibration reads none.
    h1bjax.load(other, cache="exact")


CACHE = {"name": "h1b", "sinks": 4, "window": 60}
SIGNS = {"codec": "OrthogonalSigns", "bits": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"h1b\.json is of format 2, and this version reads 1"),
        ({"format": None}, "is of format None"),
        ({"cache": None}, "does not describe its cache"),
        ({"cache": {**CACHE, "keys": {**SIGNS, "codec": "ThreePlanes"}}}, "codec 'ThreePlanes'"),
        ({"cache": {**CACHE, "keys": {**SIGNS, "codec": []}}}, r"codec \[\]"),
        ({"cache": {**CACHE, "keys": {**SIGNS, "depth": 3}}}, "valid OrthogonalSigns: .*depth"),
        ({"cache": {**CACHE, "keys": SIGNS, "phase": 3}}, "no valid CacheSpec: .*phase"),
        ({"cache": {**CACHE, "keys": SIGNS, "sinks": "x"}}, "no valid CacheSpec"),
        ({"cache": {**CACHE, "keys": SIGNS, "scores": "best"}}, "scores='best'"),
    ],
)
def test_a_description_that_cannot_be_understood_is_refused(folder, changes, message):
    save_calibration(folder, random_calibration(H1B), TEXT)
    edit(folder, "h1b", **changes)
    with pytest.raises(ValueError, match=message):
        find_calibration(folder, H1B)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1', "\udcff"])
def test_a_damaged_description_is_refused(folder, text):
    save_calibration(folder, random_calibration(H1B), TEXT)
    calibration_path(folder, "h1b").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"h1b\.json"):
        find_calibration(folder, H1B)


def test_all_misfits_of_the_arrays_are_listed(folder):
    save_calibration(folder, random_calibration(ROTATED), TEXT)

    def change(arrays):
        del arrays["mean"]
        arrays["projection"] = arrays["projection"][:, :, :3].copy()
        arrays["offset"] = arrays["offset"].astype(np.float16)
        return {**arrays, "colour": np.zeros(3, np.float32)}

    edit_arrays(folder, "h1b-v2", change)
    with pytest.raises(ValueError, match=r"h1b-v2\.safetensors does not fit") as caught:
        find_calibration(folder, ROTATED)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: mean [2, 2, 32]",
        "  unexpected: colour [3]",
        "  dtype: offset is float16 instead of float32",
        "  misshapen: projection is [2, 2, 3, 32] instead of [2, 2, 32, 32]",
    ]


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_truncated_array_file_is_refused(folder, size):
    path = save_calibration(folder, random_calibration(H1B), TEXT)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"h1b\.safetensors is damaged"):
        find_calibration(folder, H1B)
    edit(folder, "h1b", arrays_sha256=calibration_file.file_sha256(path))
    with pytest.raises(ValueError, match=r"h1b\.safetensors is not a readable safetensors"):
        find_calibration(folder, H1B)


def test_one_changed_bit_is_seen(folder):
    path = save_calibration(folder, random_calibration(H1B), TEXT)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        find_calibration(folder, H1B)


def test_a_missing_array_file_is_refused(folder):
    save_calibration(folder, random_calibration(H1B), TEXT).unlink()
    with pytest.raises(ValueError, match=r"h1b\.safetensors is missing"):
        find_calibration(folder, H1B)


def test_a_file_in_place_of_the_folder_is_refused(folder):
    (folder / "calibration").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        find_calibration(folder, H1B)


# Refused when saving


def test_nothing_is_overwritten(folder):
    save_calibration(folder, random_calibration(H1B), TEXT)
    before = contents(folder)
    with pytest.raises(FileExistsError, match=r"h1b\.json exists, and nothing is overwritten"):
        save_calibration(folder, random_calibration(H1B, seed=1), TEXT)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "-x"])
def test_a_name_that_is_no_file_name_is_refused(folder, name):
    before = contents(folder)
    with pytest.raises(ValueError, match="cannot be a file's"):
        save_calibration(folder, random_calibration(H1B.replace(name=name)), TEXT)
    assert contents(folder) == before


def test_arrays_that_do_not_fit_are_refused(folder):
    calibration = random_calibration(ROTATED)
    misfit = calibration.codec
    misfit.mean = nnx.Param(misfit.mean[...].at[1, 1, 5].set(jnp.nan))
    misfit.temperature = nnx.Param(jnp.ones((2, 2)))
    before = contents(folder)
    with pytest.raises(ValueError, match="cannot be saved") as caught:
        save_calibration(folder, Calibration(ROTATED, misfit, None), TEXT)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: value_rotation [2, 2, 32, 32]",
        "  misshapen: temperature is [2, 2] instead of [2, 4]",
        "  not finite: mean",
    ]
    assert contents(folder) == before


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        save_calibration(tmp_path, random_calibration(H1B), TEXT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["save_file", "file_sha256"])
def test_a_save_that_fails_leaves_nothing(folder, monkeypatch, broken):
    save_calibration(folder, random_calibration(ROTATED), TEXT)
    before = contents(folder)

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(calibration_file, broken, fail)
        with pytest.raises(OSError, match="no space left"):
            save_calibration(folder, random_calibration(H1B), TEXT)
    assert contents(folder) == before
    assert find_calibration(folder, H1B) is None
    save_calibration(folder, random_calibration(H1B), TEXT)
    assert find_calibration(folder, H1B) is not None


def test_a_save_that_was_killed_is_no_calibration_and_can_be_repeated(folder):
    path = save_calibration(folder, random_calibration(H1B), TEXT)
    # As if killed between the two renames, with an earlier run's remains beside.
    calibration_path(folder, "h1b").rename(path.with_name("h1b.json.partial"))
    path.with_name("h1b.safetensors.partial").write_bytes(b"half")
    assert find_calibration(folder, H1B) is None
    calibration = random_calibration(H1B, seed=1)
    save_calibration(folder, calibration, TEXT)
    assert_equal(found(folder, H1B), calibration)
    assert len(list((folder / "calibration").iterdir())) == 2


# Use


def test_a_calibrated_model_loads_without_a_warning(folder):
    calibration = random_calibration(ROTATED)
    save_calibration(folder, calibration, TEXT)
    model = h1bjax.load(folder, cache="h1b-v2", seed=3)
    assert model.spec is ROTATED
    np.testing.assert_array_equal(codec(model).projection[...], calibration.codec.projection[...])
    value = h1bjax.load(folder, cache="exact").decoder.layers.value[...]
    rotated = jnp.einsum("lekd,lkcd->lekc", value, calibration.rotation, precision="highest")
    np.testing.assert_allclose(model.decoder.layers.value[...], rotated, atol=1e-5)


def test_the_calibration_changes_what_is_read(folder):
    tokens = jnp.arange(100)[None] + 5

    def logits():
        decoder = h1bjax.load(folder, cache="h1b").decoder
        return decoder(tokens, jnp.arange(100)[None], compressed=True)[0]

    with pytest.warns(UserWarning, match="not calibrated"):
        before = logits()
    save_calibration(folder, random_calibration(H1B), TEXT)
    assert jnp.max(jnp.abs(logits() - before)) > 1e-2


def test_a_spec_of_another_name_uses_the_calibration_that_fits(folder):
    save_calibration(folder, random_calibration(H1B), TEXT)
    mine = H1B.replace(name="mine")
    assert h1bjax.load(folder, cache=mine).spec is mine


def test_a_cache_that_needs_a_calibration_loads_with_one(folder):
    with pytest.raises(ValueError, match="'fitted' needs a calibration, and there is none"):
        h1bjax.load(folder, cache=FITTED)
    save_calibration(folder, random_calibration(FITTED), TEXT)
    temperature = codec(h1bjax.load(folder, cache=FITTED)).temperature[...]
    np.testing.assert_array_equal(temperature, np.float32(0.9))


def test_without_a_calibration_the_command_and_what_there_is_are_named(folder):
    save_calibration(folder, random_calibration(ROTATED), TEXT)
    command = f"h1bjax calibrate --model {folder} --text FILE --cache h1b --out DIR"
    with pytest.warns(UserWarning, match="'h1b' is not calibrated") as caught:
        h1bjax.load(folder)
    assert command in str(caught[0].message)
    assert "there are calibrations for h1b-v2" in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"h1bjax\.calibrate.* own .*calibrations for h1b-v2"):
        h1bjax.load(folder, cache=FITTED)


def test_weights_that_are_written_again_leave_calibrations_behind(folder, tmp_path):
    save_calibration(folder, random_calibration(ROTATED), TEXT)
    h1bjax.load(folder, cache="h1b-v2").save_pretrained(tmp_path / "out", source=folder)
    assert not (tmp_path / "out" / "calibration").exists()


def test_shards_are_the_same_weights(folder, tmp_path):
    save_calibration(folder, random_calibration(H1B), TEXT)
    config = LlamaConfig.from_hf(folder)
    parameters = h1bjax.load(folder, cache="exact").decoder.parameters()
    save_pretrained(tmp_path / "shards", config, parameters, max_shard_bytes=30_000)
    shutil.copytree(folder / "calibration", tmp_path / "shards" / "calibration")
    assert find_calibration(tmp_path / "shards", H1B) is not None


def test_a_hub_id_is_refused_before_its_weights_come(monkeypatch, folder):
    asked = []

    def resolve(name, *, config_only=False):
        asked.append(config_only)
        return folder

    monkeypatch.setattr("h1bjax.model.resolve_model", resolve)
    with pytest.raises(ValueError, match="needs a calibration"):
        h1bjax.load("org/name", cache=FITTED)
    assert asked == [True]
