"""`h1bjax doctor`: what it says of a machine, and when it calls one broken."""

import json
import logging
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from h1bjax import cli, doctor, fused_attention
from h1bjax.bench.shapes import SHAPES
from h1bjax.cache import PRESETS
from h1bjax.config import LlamaConfig
from h1bjax.doctor import machine, operations, packages
from h1bjax.doctor.machine import Devices, accelerators, jax_devices, unused
from pallas_kernels import choice
from pallas_kernels.sketch_attention import choice as sketch_choice

pytestmark = pytest.mark.once

REPOSITORY = Path(__file__).parents[1]
TINY = SHAPES["tiny"]
CPU = (Devices("cpu", "cpu", 1, None, None),)
GPU = Devices("gpu", "NVIDIA H100 80GB HBM3", 8, 60_000_000_000, 1000)


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs `h1bjax doctor` on a machine without accelerators."""
    monkeypatch.setattr(doctor, "accelerators", lambda: ())

    def run(*arguments):
        code = cli.main(["doctor", *map(str, arguments)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def installed(monkeypatch):
    """Replaces what is installed, of which only versions matter."""

    def installed(**versions):
        named = {name.replace("_", "-"): number for name, number in versions.items()}
        for module in (machine, packages):
            monkeypatch.setattr(module, "installed_version", named.get)

    return installed


def device_files(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def pci_device(root, name, vendor, device):
    folder = root / "sys/bus/pci/devices" / name
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


# The command


def test_it_says_what_runs_and_why(run, toy_folder):
    code, out, err = run("--model", toy_folder, "--cache", "h1b", "--dtype", "float32")
    assert (code, err) == (0, "")
    assert re.search(rf"^  jax +{re.escape(jax.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^  cpu  8 × cpu$", out, re.MULTILINE)
    config = LlamaConfig.from_hf(toy_folder)
    heads = f"{config.num_heads} heads and {config.num_kv_heads} KV heads"
    assert f"how the cache h1b runs for {heads} of {config.head_dim} channels, float32" in out
    assert re.search(
        r"^  append of a token +xla +the default device is neither an NVIDIA GPU nor a TPU",
        out,
        re.M,
    )
    assert re.search(r"^a decode step of one layer took [\d.]+ s", out, re.MULTILINE)
    assert out.endswith("no problems found\n")


def test_json_is_one_object_with_the_same(run):
    code, out, err = run("--head-dim", 32, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    printed = json.loads(out)
    assert printed["versions"]["jax"] == jax.__version__
    assert printed["devices"] == [
        {"platform": "cpu", "kind": "cpu", "count": 8, "memory": None, "used": None}
    ]
    assert [one["name"] for one in printed["operations"]] == [
        "attention to the stored tokens",
        "exact attention to the window",
        "append of a token",
        "attention of prompts",
    ]
    assert printed["seconds"] > 0
    assert printed["problems"] == printed["notes"] == []
    assert set(printed["extras"]) == set(packages.EXTRAS)


def test_a_gpu_that_jax_does_not_use_is_an_error(run, monkeypatch, installed):
    installed(jax="1.2.3", jaxlib="1.2.3")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor, "accelerators", lambda: ("NVIDIA GPU",))
    code, out, err = run("--head-dim", 32)
    assert code == 2
    assert err == (
        "h1bjax: error: there is a NVIDIA GPU, but JAX runs on the CPU: jax-cuda12-plugin is not "
        "installed; pip install 'h1bjax[gpu]'\n"
    )
    assert "no problems found" not in out
    assert "append of a token" in out


def test_a_decode_step_that_fails_is_an_error(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("ptxas is missing\nat all")

    monkeypatch.setattr(operations, "try_step", fail)
    code, out, err = run("--head-dim", 32)
    assert (code, err) == (2, "h1bjax: error: a decode step fails: ptxas is missing at all\n")
    assert "append of a token" in out


def test_a_jax_that_does_not_start_is_an_error(run, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(doctor, "jax_devices", fail)
    code, out, err = run()
    assert code == 2
    assert err == "h1bjax: error: JAX finds no device: Unable to initialize backend 'cuda'\n"
    assert re.search(r"devices that JAX uses\n  none\n", out)


def test_a_platform_for_which_nothing_is_installed_is_an_error(monkeypatch):
    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(RuntimeError, match="nothing is installed for JAX_PLATFORMS=cuda"):
        jax_devices()


def test_packages_that_cannot_be_imported_are_an_error(run, monkeypatch):
    def fail(module):
        if module == "flax.nnx":
            raise AttributeError("jax has no such thing")

    monkeypatch.setattr(packages, "import_module", fail)
    code, out, err = run()
    assert code == 2
    assert err.startswith("h1bjax: error: flax.nnx cannot be imported: jax has no such thing; pip")
    assert "versions" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "h2b"], "unknown cache preset 'h2b'"),
        (["--head-dim", "33"], "--head-dim 33 must be even"),
        (["--cache", "kivi-2", "--head-dim", "40"], "a multiple of 32, got 40"),
        (["--head-dim", "64", "--model", "x"], "not allowed with argument"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"h1bjax: error: .*{message}.*\n", err), err


# What the machine has


def test_accelerators_are_seen_without_jax(tmp_path):
    assert accelerators(tmp_path) == ()
    pci_device(tmp_path, "0000:00:01.0", "0x1ae0", "0x0042")  # a network card of Google's
    pci_device(tmp_path, "0000:00:02.0", "0x8086", "0x0063")
    device_files(tmp_path, "dev/nvidiactl", "dev/accel/accel0")
    assert accelerators(tmp_path) == ()
    pci_device(tmp_path, "0000:00:03.0", "0x1ae0", "0x0063")
    assert accelerators(tmp_path) == ("TPU",)
    assert accelerators(device_files(tmp_path, "dev/nvidia0")) == ("NVIDIA GPU", "TPU")


def test_devices_of_one_kind_are_counted():
    assert jax_devices() == (Devices("cpu", "cpu", 8, None, None),)


def test_an_accelerator_in_use_is_no_problem():
    assert unused(("NVIDIA GPU",), (GPU,), {}) == ([], [])
    assert unused((), CPU, {}) == ([], [])


def test_an_accelerator_that_was_switched_off_is_only_noted():
    problems, notes = unused(("NVIDIA GPU", "TPU"), CPU, {"JAX_PLATFORMS": "cpu"})
    assert problems == []
    assert notes[1] == "the TPU is not used, because JAX_PLATFORMS is 'cpu'"
    assert unused(("NVIDIA GPU", "TPU"), (GPU,), {}) == (
        [],
        ["the TPU is not used, because JAX prefers the gpu"],
    )


@pytest.mark.parametrize(
    ("versions", "advice"),
    [
        ({}, r"libtpu is not installed; pip install 'h1bjax\[tpu\]'"),
        ({"libtpu": "0.0.50"}, "libtpu 0.0.50 is installed; JAX_PLATFORMS=tpu python -c .* says"),
    ],
)
def test_advice_for_a_tpu(installed, versions, advice):
    installed(jaxlib="0.12.0", **versions)
    ((problem,), _) = unused(("TPU",), CPU, {})
    assert re.search(advice, problem)


@pytest.mark.parametrize(
    ("versions", "advice"),
    [
        ({"jax_cuda13_plugin": "0.12.0"}, "jax-cuda13-plugin 0.12.0 is installed; .*cuda python"),
        ({"jax_cuda12_plugin": "0.11.2"}, "pip install jax-cuda12-plugin==0.12.0"),
    ],
)
def test_advice_for_a_gpu(installed, versions, advice):
    installed(jaxlib="0.12.0", **versions)
    ((problem,), _) = unused(("NVIDIA GPU",), CPU, {"JAX_PLATFORMS": ""})
    assert re.search(advice, problem)


# What is installed


def test_extras_are_those_of_the_project():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # JAX's own extras bring its plugins, whose names no metadata of ours mentions.
    for name in ("triton", "train", "eval"):
        needed = {re.split(r"[^\w-]", line)[0] for line in extras[name]} - {"jax"}
        assert packages.EXTRAS[name] == (tuple(sorted(needed)),)
    assert set(packages.EXTRAS) <= set(extras)


def test_an_extra_lacks_the_fewest_packages(installed):
    installed(jax_cuda13_plugin="0.12.0", triton="3.6.0")
    assert packages.missing_packages("gpu") == ()
    assert packages.missing_packages("triton") == ("jax-triton",)
    assert packages.missing_packages("tpu") == ("libtpu",)
    assert list(packages.installed_versions()) == ["python", "jax-cuda13-plugin", "triton"]


# Which operations run


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_operations(preset):
    config = replace(TINY, head_dim=64)
    found = {one.name: one for one in operations.operations(PRESETS[preset], config, "bfloat16")}
    assert all(one.implementation in ("xla", "none") and one.reason for one in found.values())
    stored = found["attention to the stored tokens"].implementation
    assert (stored == "none") == (preset == "sinks-window")
    assert ("exact attention to the window" in found) == (PRESETS[preset].window > 0)


@pytest.mark.parametrize(
    "preset",
    [
        "h1b-p32-v2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("h1b-paper", "kivi-4")),
    ],
)
def test_choices_are_those_of_a_step_that_runs(preset, caplog):
    """What a real step logs of the operations that have kernels is what is reported."""
    config = replace(TINY, head_dim=32)
    reported = operations.operations(PRESETS[preset], config, "float32")
    choice.log_once.cache_clear()
    jax.clear_caches()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        assert operations.try_step(PRESETS[preset], config, "float32") > 0
    logged = {record.message.partition(" runs as ")[2] for record in caplog.records}
    expected = {
        f"{one.implementation}: {one.reason}"
        for one in reported
        if one.name != "attention of prompts" and not one.reason.startswith(("kernels", "the kern"))
    }
    assert logged == expected


def test_a_step_that_gives_no_number_fails(monkeypatch):
    monkeypatch.setattr(operations, "_decode", lambda step: step.query / 0)
    with pytest.raises(RuntimeError, match="gave NaN or infinity"):
        operations.try_step(PRESETS["exact"], TINY, "float32")


@pytest.mark.parametrize("preset", ["h1b", "h1b-p32-v2", "h1b-2plane", "h1b-paper"])
def test_a_gpu_of_hopper_runs_every_operation_by_its_kernel(monkeypatch, preset):
    for module in (choice, sketch_choice, fused_attention):
        monkeypatch.setattr(module, "cuda_capability", lambda: (9, 0))
    # Older versions copy what kernels read, so kernels refuse them.
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    config = SHAPES["llama-3-8b"]
    found = {one.name: one for one in operations.operations(PRESETS[preset], config, "bfloat16")}
    assert found.pop("attention of prompts").implementation == "cudnn"
    assert {one.implementation for one in found.values()} == {"mosaic_gpu"}
    grouped = operations.operations(PRESETS["kivi-2"], config, "bfloat16")
    assert [one.implementation for one in grouped] == ["xla", "mosaic_gpu", "xla", "cudnn"]


def test_a_tpu_runs_the_kernels_it_has(monkeypatch):
    monkeypatch.setattr(choice, "tpu_generation", lambda: 5)
    found = operations.operations(PRESETS["h1b"], SHAPES["llama-3-8b"], "bfloat16")
    assert [(one.implementation, one.reason) for one in found if "stored" in one.name] == [
        ("mosaic_tpu", "a TPU v5")
    ]
    assert [one.implementation for one in found if "append" in one.name] == ["mosaic_tpu"]
