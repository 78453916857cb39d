"""The decoder computes what transformers computes, layer by layer, for every family."""

import importlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h1bjax.cache import CacheSpec, KVCache
from h1bjax.checkpoint import load_parameters
from h1bjax.config import LlamaConfig
from h1bjax.decoder import Decoder

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
LOGITS = 1e-4  # absolute, float32
HIDDEN = 1e-5  # relative to the largest value of the layer, float32

run = jax.jit(Decoder.__call__)


@jax.jit
def run_each_way(decoder, tokens, positions, cache):
    """Layer outputs, logits without a cache and logits through it; one program compiles faster."""
    return (
        decoder.layer_outputs(tokens, positions),
        decoder(tokens, positions)[0],
        decoder(tokens, positions, cache)[0],
    )


def load_golden(folder):
    """A golden model as our decoder, with its inputs and what transformers made of them."""
    config = LlamaConfig.from_hf(folder)
    with np.load(folder / "golden.npz") as arrays:
        return make_case(folder, config, **arrays)


def make_case(folder, config, *, tokens, lengths, logits, layer_outputs):
    steps = np.arange(tokens.shape[1], dtype=np.int32)
    valid = steps < lengths[:, None]
    return SimpleNamespace(
        config=config,
        decoder=Decoder(config, load_parameters(folder, config, jnp.float32)),
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(np.where(valid, steps, -1)),
        valid=valid,
        logits=logits,
        layer_outputs=layer_outputs,
    )


def exact_cache(case):
    batch, length = case.tokens.shape
    spec = CacheSpec.preset("exact")
    return KVCache.init(case.config, spec, batch=batch, max_length=length, dtype=jnp.float32)


def assert_logits(logits, case):
    ours, theirs = np.asarray(logits)[case.valid], case.logits[case.valid]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGITS)


def assert_layers(outputs, case):
    assert outputs.shape == case.layer_outputs.shape
    for layer, (ours, theirs) in enumerate(zip(outputs, case.layer_outputs, strict=True)):
        expected = theirs[case.valid]
        np.testing.assert_allclose(
            np.asarray(ours)[case.valid],
            expected,
            rtol=0,
            atol=HIDDEN * np.abs(expected).max(),
            err_msg=f"layer_outputs[{layer}]",
        )


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request):
    case = load_golden(GOLDEN / request.param)
    outputs = run_each_way(case.decoder, case.tokens, case.positions, exact_cache(case))
    case.our_layers, case.our_logits, case.our_cached_logits = outputs
    return case


def test_golden_files_cover_every_family():
    assert len(FAMILIES) == 8
    assert {LlamaConfig.from_hf(GOLDEN / name).model_type for name in FAMILIES} == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    }


def test_layers_agree_with_transformers(golden):
    assert_layers(golden.our_layers, golden)


def test_logits_agree_with_transformers(golden):
    assert_logits(golden.our_logits, golden)


def test_logits_through_an_exact_cache_agree_with_transformers(golden):
    assert_logits(golden.our_cached_logits, golden)


@pytest.mark.parametrize("family", ["llama_gqa_tied_llama3_rope", "qwen3"])
def test_logits_of_chunks_and_single_tokens_agree_with_transformers(family):
    golden = load_golden(GOLDEN / family)
    cache, parts = exact_cache(golden), []
    bounds = [0, 6, 12, *range(13, golden.tokens.shape[1] + 1)]
    for start, stop in pairwise(bounds):
        tokens, positions = golden.tokens[:, start:stop], golden.positions[:, start:stop]
        logits, cache = run(golden.decoder, tokens, positions, cache)
        parts.append(logits)
    assert_logits(jnp.concatenate(parts, axis=1), golden)


def old_style(raw):
    """The config.json that transformers 4 would have written."""
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    raw["torch_dtype"] = raw.pop("dtype")
    return raw


@pytest.mark.parametrize("family", FAMILIES)
def test_an_old_style_config_means_the_same(tmp_path, family):
    shutil.copytree(GOLDEN / family, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    raw = old_style(json.loads(path.read_text()))
    assert "rope_parameters" not in raw
    path.write_text(json.dumps(raw))
    assert LlamaConfig.from_hf(tmp_path) == LlamaConfig.from_hf(GOLDEN / family)


def random_overrides(seed):
    """Keys of a small random config.json; the family goes round with the seed."""
    generator = np.random.default_rng(seed)

    def choose(*options):
        return options[generator.integers(len(options))]

    model_type = ("llama", "mistral", "qwen2", "qwen3")[seed % 4]
    kv_heads = choose(1, 2, 3)
    heads = kv_heads * choose(1, 2, 4)
    theta = choose(10_000.0, 500_000.0)
    ropes = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 24,
        },
    ]
    overrides = {
        "model_type": model_type,
        "vocab_size": choose(50, 97),
        "hidden_size": heads * choose(8, 14),
        "intermediate_size": choose(33, 64),
        "num_hidden_layers": choose(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": choose(1e-6, 1e-5),
        "tie_word_embeddings": choose(True, False),
        "rope_parameters": {**choose(*ropes), "rope_theta": theta},
    }
    if model_type != "qwen2":
        overrides["head_dim"] = choose(8, 32, 64, 96, 128)
    if model_type in ("llama", "qwen3"):
        overrides["attention_bias"] = choose(True, False)
    if model_type == "llama":
        overrides["mlp_bias"] = choose(True, False)
    if model_type == "mistral":
        overrides["sliding_window"] = choose(None, 64)
    return overrides


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 32))]
)
def test_fresh_random_models_agree_with_transformers(tmp_path, seed):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    make_golden = importlib.import_module("golden.make_golden")
    model = make_golden.make_model(random_overrides(seed), seed)
    model.save_pretrained(tmp_path)
    tokens, lengths = make_golden.random_tokens(model.config.vocab_size, seed)
    logits, layer_outputs = make_golden.run_model(model, tokens, lengths)
    case = make_case(
        tmp_path,
        LlamaConfig.from_hf(tmp_path),
        tokens=tokens,
        lengths=lengths,
        logits=logits,
        layer_outputs=layer_outputs,
    )
    layers, plain, cached = run_each_way(
        case.decoder, case.tokens, case.positions, exact_cache(case)
    )
    assert_layers(layers, case)
    assert_logits(plain, case)
    assert_logits(cached, case)
