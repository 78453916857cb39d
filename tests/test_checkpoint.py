"""Checkpoints stream in and out of safetensors, bit for bit, and say everything that is wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from h1bjax import checkpoint
from h1bjax.checkpoint import load_parameters, resolve_model, save_pretrained
from h1bjax.config import LlamaConfig
from h1bjax.parameters import decoder_parameters

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
REPOSITORY = Path(__file__).parents[1]


def small_config(**keys):
    return LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 12,
            "hidden_size": 8,
            "intermediate_size": 10,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            **keys,
        }
    )


def random_tensors(config, dtype=np.float32, seed=0):
    """Checkpoint tensors by name, as transformers would store them."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(info.hf_shape).astype(dtype)
        for info in decoder_parameters(config).values()
        for name in info.hf_names(config.num_layers)
    }


def write_checkpoint(folder, config, tensors, shards=1):
    """Writes config.json and the tensors, dealt to the shards like cards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        names = sorted(tensors)[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def run_python(code, *arguments, **environment):
    """Runs code in its own process, where memory and devices are its own."""
    completed = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


def assert_same(left, right):
    assert list(left) == list(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(np.asarray(array), np.asarray(right[name]), err_msg=name)


def test_every_parameter_is_the_tensor_that_the_formulas_mean(tmp_path):
    config = small_config(attention_bias=True, mlp_bias=True)
    tensors = random_tensors(config)
    parameters = load_parameters(write_checkpoint(tmp_path, config, tensors), config, jnp.float32)

    assert list(parameters) == list(decoder_parameters(config))
    for layer in range(3):
        ours = {name: np.asarray(array[layer]) for name, array in parameters.items()}
        theirs = {
            name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in tensors.items()
        }
        x = np.random.default_rng(1).standard_normal(8).astype(np.float32)
        for name, tensor, heads in (("query", "q", 4), ("key", "k", 2), ("value", "v", 2)):
            projected = theirs[f"self_attn.{tensor}_proj.weight"] @ x
            projected = projected + theirs[f"self_attn.{tensor}_proj.bias"]
            assert ours[name].shape == (8, heads, 6)
            mine = np.einsum("e,ehd->hd", x, ours[name]) + ours[f"{name}_bias"]
            np.testing.assert_allclose(mine, projected.reshape(heads, 6), rtol=1e-4, atol=1e-5)
        attended = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
        np.testing.assert_allclose(
            np.einsum("hd,hde->e", attended, ours["output"]),
            theirs["self_attn.o_proj.weight"] @ attended.reshape(24),
            rtol=1e-4,
            atol=1e-5,
        )
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(ours[name], theirs[f"mlp.{name}_proj.weight"].T)
            np.testing.assert_array_equal(ours[f"{name}_bias"], theirs[f"mlp.{name}_proj.bias"])
        np.testing.assert_array_equal(ours["output_bias"], theirs["self_attn.o_proj.bias"])
        np.testing.assert_array_equal(ours["attention_norm"], theirs["input_layernorm.weight"])
        np.testing.assert_array_equal(ours["mlp_norm"], theirs["post_attention_layernorm.weight"])
    np.testing.assert_array_equal(parameters["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(parameters["unembedding"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(parameters["final_norm"], tensors["model.norm.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_describes_every_tensor_that_transformers_wrote(family):
    config = LlamaConfig.from_hf(GOLDEN / family)
    expected = {
        name: info.hf_shape
        for info in decoder_parameters(config).values()
        for name in info.hf_names(config.num_layers)
    }
    stored = load_file(GOLDEN / family / "model.safetensors")
    assert expected == {name: tensor.shape for name, tensor in stored.items()}


@settings(deadline=None, max_examples=25)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 5).map(lambda half: 2 * half),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("attention_bias", "mlp_bias", "tie_word_embeddings")}
    ),
)
def test_to_hf_undoes_from_hf(kv_heads, group, head_dim, flags):
    config = small_config(
        num_key_value_heads=kv_heads, num_attention_heads=kv_heads * group, head_dim=head_dim
    )
    config = LlamaConfig.from_hf({**config.to_hf(), **flags})
    table = decoder_parameters(config)
    assert ("unembedding" in table) != flags["tie_word_embeddings"]
    assert ("down_bias" in table) == flags["mlp_bias"]
    for info in table.values():
        tensor = np.random.default_rng(0).standard_normal(info.hf_shape)
        ours = info.from_hf(tensor)
        assert ours.shape == info.shape
        assert len(info.axes) == len(info.shape)
        np.testing.assert_array_equal(info.to_hf(ours), tensor)


def test_one_file_and_many_shards_load_alike(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    one = write_checkpoint(tmp_path / "one", config, tensors)
    many = write_checkpoint(tmp_path / "many", config, tensors, shards=5)
    assert_same(
        load_parameters(one, config, jnp.float32), load_parameters(many, config, jnp.float32)
    )


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (np.float64, jnp.float32),
        (np.float32, jnp.bfloat16),
        (np.float16, jnp.bfloat16),
        (ml_dtypes.bfloat16, jnp.float16),
    ],
)
def test_any_stored_dtype_becomes_the_wanted_one(tmp_path, stored, wanted):
    config = small_config(num_hidden_layers=1)
    tensors = random_tensors(config, stored)
    parameters = load_parameters(write_checkpoint(tmp_path, config, tensors), config, wanted)
    assert {array.dtype for array in parameters.values()} == {jnp.dtype(wanted)}
    expected = tensors["model.layers.0.mlp.up_proj.weight"].T.astype(jnp.dtype(wanted))
    np.testing.assert_array_equal(np.asarray(parameters["up"][0]), expected)


@pytest.mark.parametrize(
    ("dtype", "reason"), [(jnp.int8, "must be a floating dtype"), (np.float64, "jax_enable_x64")]
)
def test_a_dtype_that_weights_cannot_have_is_refused(dtype, reason):
    folder = GOLDEN / "llama_mha"
    with pytest.raises(ValueError, match=reason):
        load_parameters(folder, LlamaConfig.from_hf(folder), dtype)


def test_harmless_extras_are_accepted(tmp_path):
    config = small_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    extras = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.rotary_emb.inv_freq": np.ones(3, np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    folder = write_checkpoint(tmp_path, config, tensors | extras)
    assert "unembedding" not in load_parameters(folder, config, jnp.float32)


def test_missing_unexpected_and_misshapen_tensors_are_reported_together(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((24, 8), np.int8)
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(8, np.float32)
    tensors["score.weight"] = np.zeros((2, 8), np.float32)
    folder = write_checkpoint(tmp_path, config, tensors, shards=3)
    with pytest.raises(ValueError, match="do not fit its llama config") as caught:
        load_parameters(folder, config, jnp.float32)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.0.mlp.up_proj.weight [10, 8]",
        "  missing: model.layers.2.mlp.up_proj.weight [10, 8]",
        "  not floating point: model.layers.1.self_attn.q_proj.weight is I8 (readable: F64, F32, "
        "F16, BF16)",
        "  unexpected: model.layers.3.input_layernorm.weight [8]",
        "  misshapen: model.norm.weight is [9], config.json asks for [8]",
        "  unexpected: score.weight [2, 8]",
    ]


def test_nothing_is_read_before_the_headers_agree(tmp_path, monkeypatch):
    config = small_config()
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path, config, tensors)

    def read_tensor(*_arguments):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint, "_read_tensor", read_tensor)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load_parameters(folder, config, jnp.float32)


def test_all_absent_shards_are_listed(tmp_path):
    config = small_config()
    folder = write_checkpoint(tmp_path, config, random_tensors(config), shards=4)
    for number in (2, 4):
        (folder / f"model-{number:05d}-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00004\S+, model-00004-of-00004"):
        load_parameters(folder, config, jnp.float32)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    config = small_config()
    folder = write_checkpoint(tmp_path, config, random_tensors(config), shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"lm_head.weight": np.zeros((12, 8), np.float32)}, second)
    with pytest.raises(ValueError, match=r"in two shards of .*: lm_head\.weight \(model-00001"):
        load_parameters(folder, config, jnp.float32)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", 'must hold an object "weight_map"'),
        ('{"weight_map": {}}', 'must hold an object "weight_map"'),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"outside its folder: \.\./b"),
    ],
)
def test_a_bad_index_is_named(tmp_path, index, reason):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=reason):
        load_parameters(tmp_path, small_config(), jnp.float32)


def test_pickle_is_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.* never loaded.*save_pretr"):
        load_parameters(tmp_path, small_config(), jnp.float32)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_parameters(tmp_path, small_config(), jnp.float32)
    with pytest.raises(FileNotFoundError, match=r"There is no model folder .*absent"):
        load_parameters(tmp_path / "absent", small_config(), jnp.float32)


@pytest.mark.parametrize("cut", [4, 1000], ids=["header", "data"])
def test_a_truncated_file_is_named(tmp_path, cut):
    config = small_config()
    file = write_checkpoint(tmp_path, config, random_tensors(config)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut] if cut == 4 else file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_parameters(tmp_path, config, jnp.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_save_load_is_bit_identical(tmp_path, family):
    folder = GOLDEN / family
    config = LlamaConfig.from_hf(folder)
    parameters = load_parameters(folder, config, jnp.bfloat16)
    save_pretrained(tmp_path, config, parameters, max_shard_bytes=50_000)
    again = LlamaConfig.from_hf(tmp_path)
    assert again == replace(config, dtype="bfloat16")
    assert_same(load_parameters(tmp_path, again, jnp.bfloat16), parameters)


def test_float32_weights_are_written_as_transformers_wrote_them(tmp_path):
    folder = GOLDEN / "llama_biases"
    config = LlamaConfig.from_hf(folder)
    save_pretrained(tmp_path, config, load_parameters(folder, config, jnp.float32))
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert_same(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_respect_their_limit_and_the_index_names_them(tmp_path):
    config = small_config()
    folder = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    parameters = load_parameters(folder, config, jnp.float32)
    save_pretrained(tmp_path / "out", config, parameters, max_shard_bytes=1500)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    held = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in held.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= 1500
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_tokenizer_and_generation_files_are_copied(tmp_path):
    config = small_config()
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    copied = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    for name in (*copied, "README.md", "pytorch_model.bin"):
        (source / name).write_text("{}")
    parameters = load_parameters(source, config, jnp.float32)
    save_pretrained(tmp_path / "out", config, parameters, source=source)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == copied | {"config.json", "model.safetensors"}


def test_nothing_is_overwritten(tmp_path):
    config = small_config()
    folder = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    parameters = load_parameters(folder, config, jnp.float32)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match="is the source of this model"):
        save_pretrained(folder, config, parameters, source=tmp_path / "in" / ".." / "in")
    with pytest.raises(ValueError, match="is not empty, and nothing is overwritten"):
        save_pretrained(folder, config, parameters)
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(folder / "config.json", config, parameters)
    with pytest.raises(FileNotFoundError, match="There is no source folder"):
        save_pretrained(tmp_path / "out", config, parameters, source=tmp_path / "absent")
    with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
        save_pretrained(tmp_path / "out", config, parameters, max_shard_bytes=0)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_used(tmp_path):
    folder = GOLDEN / "llama_mha"
    config = LlamaConfig.from_hf(folder)
    (tmp_path / "out").mkdir()
    save_pretrained(tmp_path / "out", config, load_parameters(folder, config, jnp.float32))
    assert (tmp_path / "out" / "config.json").is_file()


def test_parameters_that_do_not_fit_are_listed_before_writing(tmp_path):
    folder = GOLDEN / "llama_mha"
    config = LlamaConfig.from_hf(folder)
    parameters = load_parameters(folder, config, jnp.float32)
    del parameters["gate"]
    parameters["up"] = parameters["up"][:1]
    parameters["down"] = parameters["down"].astype(jnp.int8)
    parameters["extra"] = jnp.zeros(3)
    with pytest.raises(ValueError, match="do not fit the llama config") as caught:
        save_pretrained(tmp_path / "out", config, parameters)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: gate",
        "  misshapen: up is [1, 32, 40] instead of [2, 32, 40]",
        "  dtype: down is int8 (writable: float32, bfloat16, float16)",
        "  unexpected: extra [3]",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_was_written(tmp_path, family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = GOLDEN / family
    config = LlamaConfig.from_hf(folder)
    save_pretrained(
        tmp_path, config, load_parameters(folder, config, jnp.float32), max_shard_bytes=60_000
    )
    tokens = torch.arange(20)[None]
    logits = []
    for path in (folder, tmp_path):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_a_real_checkpoint_survives_the_round_trip(tmp_path, shared_data):
    source = shared_data / "models" / "stories260K"
    config = LlamaConfig.from_hf(source)
    parameters = load_parameters(source, config, jnp.float32)
    save_pretrained(tmp_path, config, parameters, source=source)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, source))
    theirs.pop("lm_head.weight", None)
    assert_same(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_one_compilation_per_parameter_shape(tmp_path, caplog):
    config = small_config(num_hidden_layers=7, hidden_size=14)
    folder = write_checkpoint(tmp_path, config, random_tensors(config), shards=3)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        load_parameters(folder, config, jnp.float16)
    compiled = [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith("Compiling jit(_update_layer)")
    ]
    stacked = [info for info in decoder_parameters(config).values() if info.stacked]
    programs = {(info.shape, info.permutation) for info in stacked}
    assert len(compiled) == len(programs) < len(stacked)


def test_the_progress_bar_needs_a_terminal(capfd):
    folder = GOLDEN / "llama_mha"
    load_parameters(folder, LlamaConfig.from_hf(folder), jnp.float32)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


MEASURE_MEMORY = """
import json, re, sys
import jax.numpy as jnp
from h1bjax.checkpoint import load_parameters, save_pretrained
from h1bjax.config import LlamaConfig

def resident(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def peak_of(call):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = resident("VmRSS")
    result = call()
    return result, resident("VmHWM") - before

folder, warm_up, out = sys.argv[1:]
load_parameters(warm_up, LlamaConfig.from_hf(warm_up), jnp.bfloat16)
config = LlamaConfig.from_hf(folder)
parameters, loading = peak_of(lambda: load_parameters(folder, config, jnp.bfloat16))
_, saving = peak_of(lambda: save_pretrained(out, config, parameters, max_shard_bytes=5e7))
model = sum(array.nbytes for array in parameters.values())
print(json.dumps({"model": model, "loading": loading, "saving": saving}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_host_never_holds_two_models(tmp_path):
    config = small_config(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=15,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    tensors = {
        name: np.full(info.hf_shape, 0.5, np.float32)
        for info in decoder_parameters(config).values()
        for name in info.hf_names(config.num_layers)
    }
    stored = sum(tensor.nbytes for tensor in tensors.values())
    folder = write_checkpoint(tmp_path / "big", config, tensors, shards=5)
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    measured = run_python(
        MEASURE_MEMORY,
        folder,
        GOLDEN / "llama_mha",
        tmp_path / "out",
        # Freed buffers go back to the system at once, so that what is measured is what is held.
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    shutil.rmtree(tmp_path / "big")
    shutil.rmtree(tmp_path / "out")

    model = measured["model"]
    assert model == stored // 2
    compiled_code = 64e6
    assert shard + compiled_code < 1.2 * model < stored, "the limits would show nothing"
    assert measured["loading"] < model + shard + compiled_code
    assert measured["saving"] < compiled_code


SHARD_ON_FOUR_DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from h1bjax import checkpoint
from h1bjax.checkpoint import load_parameters, save_pretrained
from h1bjax.config import LlamaConfig

folder, out, rules = sys.argv[1:]
rules = json.loads(rules)
config = LlamaConfig.from_hf(folder)
plain = load_parameters(folder, config, jnp.float32)

part_of = checkpoint._read_part
reads = []
def read_part(view, info, index):
    part = part_of(view, info, index)
    reads.append((info.hf_name, part.size))
    return part
checkpoint._read_part = read_part

results = []
for axis_type in (AxisType.Auto, AxisType.Explicit):
    reads.clear()
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)

    def sharding(axes):
        return NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in axes)))

    sharded = load_parameters(folder, config, jnp.float32, sharding)
    save_pretrained(out + "/" + axis_type.name, config, sharded)
    table = checkpoint.decoder_parameters(config)
    results.append({
        "different": [name for name in plain
                      if not np.array_equal(np.asarray(sharded[name]), np.asarray(plain[name]))],
        "misplaced": [name for name, info in table.items()
                      if not sharded[name].sharding.is_equivalent_to(
                          sharding((None, *info.axes) if info.stacked else info.axes),
                          sharded[name].ndim)],
        "sizes_of_query_reads": [n for name, n in reads if name.endswith("q_proj.weight")],
        "folder": out + "/" + axis_type.name,
    })
print(json.dumps(results))
"""


@pytest.mark.parametrize(
    "rules",
    [
        {"kv_heads": "x", "heads": "x", "mlp": "x", "vocab": "x", "embed": "y"},
        {"head_dim": "y", "heads": "x", "mlp": ["x", "y"], "vocab": ["x", "y"]},
    ],
    ids=["heads and embed", "inside heads"],
)
def test_each_device_reads_its_own_part(tmp_path, rules):
    config = small_config(attention_bias=True, vocab_size=16, intermediate_size=12)
    tensors = random_tensors(config)
    folder = write_checkpoint(tmp_path / "in", config, tensors, shards=2)
    results = run_python(
        SHARD_ON_FOUR_DEVICES,
        folder,
        tmp_path / "out",
        json.dumps(rules),
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert len(results) == 2
    for result in results:
        assert result["different"] == []
        assert result["misplaced"] == []
        assert result["sizes_of_query_reads"] == [24 * 8 // 4] * 4 * config.num_layers
        written = load_file(Path(result["folder"]) / "model.safetensors")
        assert_same(dict(sorted(written.items())), dict(sorted(tensors.items())))


def test_an_existing_folder_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a/b/c", "a b", "", "org/na--me"])
def test_neither_folder_nor_id_is_refused_without_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError, match=r'no folder .*hub id \("name" or "org/name"\)'):
        resolve_model(name)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        resolve_model(tmp_path / "config.json")


def test_the_hub_is_asked_for_no_pickle(monkeypatch, tmp_path):
    asked: dict[str, Any] = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == tmp_path
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
    }
    refused = {
        "pytorch_model.bin",
        "tokenizer.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.safetensors",
        "README.md",
    }
    kept = filter_repo_objects(
        sorted(wanted | refused),
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert asked["name"] == "org/name"
    assert set(kept) == wanted


def hub_failures():
    transport = errors.HfHubHTTPError.__mro__[1]
    return [
        errors.LocalEntryNotFoundError("no connection\nsecond line"),
        transport("no connection"),
        OSError("no connection"),
        errors.OfflineModeIsEnabled("no connection"),
    ]


@pytest.mark.parametrize("failure", hub_failures(), ids=lambda error: type(error).__name__)
def test_hub_failures_become_one_line_that_names_the_id(monkeypatch, failure):
    def snapshot_download(_name, **_options):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"'org/name'.* hub .*: no connection$"):
        resolve_model("org/name")
