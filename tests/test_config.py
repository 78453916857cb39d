"""LlamaConfig reads config.json as transformers means it, and refuses what is not computed."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1bjax.config import LlamaConfig, RopeConfig

pytestmark = pytest.mark.once


SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf(model_type="llama", **keys):
    """A config.json of that family with some keys set."""
    return {"model_type": model_type, **SHAPE, **keys}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_reads_a_folder_a_file_and_a_dictionary_alike(tmp_path):
    write(tmp_path, "config.json", hf())
    expected = LlamaConfig.from_hf(hf())
    assert LlamaConfig.from_hf(tmp_path) == expected
    assert LlamaConfig.from_hf(str(tmp_path)) == expected
    assert LlamaConfig.from_hf(tmp_path / "config.json") == expected


def test_shape_and_flags_of_llama():
    config = LlamaConfig.from_hf(
        hf(
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            torch_dtype="bfloat16",
            bos_token_id=3,
            eos_token_id=4,
        )
    )
    assert config == LlamaConfig(
        model_type="llama",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(type="default", theta=10_000.0),
        tie_word_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        dtype="bfloat16",
        bos_token_id=3,
        eos_token_ids=(4,),
    )
    assert hash(config) == hash(LlamaConfig.from_hf(config.to_hf()))


@pytest.mark.parametrize(
    ("model_type", "num_kv_heads", "head_dim", "positions", "window", "bos", "eos"),
    [
        ("llama", 32, 2, 2048, None, 1, (2,)),
        ("mistral", 8, 2, 131_072, 4096, 1, (2,)),
        ("qwen2", 32, 2, 32_768, None, None, ()),
        ("qwen3", 32, 128, 32_768, None, None, ()),
    ],
)
def test_omitted_keys_have_the_defaults_of_their_family(
    model_type, num_kv_heads, head_dim, positions, window, bos, eos
):
    raw = without(hf(model_type, num_attention_heads=32), "num_key_value_heads")
    config = LlamaConfig.from_hf(raw)
    assert config.num_kv_heads == num_kv_heads
    assert config.head_dim == head_dim
    assert config.max_position_embeddings == positions
    assert config.sliding_window == window
    assert (config.bos_token_id, config.eos_token_ids) == (bos, eos)
    assert config.rms_norm_eps == 1e-6
    assert config.rope == RopeConfig("default", 10_000.0)
    assert config.tie_word_embeddings is False
    assert config.dtype == "float32"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 7e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 99},
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 99},
        {"head_dim": 24, "tie_word_embeddings": True, "attention_bias": True},
    ],
    ids=lambda keys: "+".join(keys) or "defaults",
)
def test_means_what_transformers_means(model_type, keys):
    transformers = pytest.importorskip("transformers")
    raw = without(hf(model_type, num_attention_heads=32, **keys), "num_key_value_heads")
    theirs = transformers.CONFIG_MAPPING[model_type].from_dict(raw)
    ours = LlamaConfig.from_hf(raw)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", raw["hidden_size"] // 32)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (
        theirs.bos_token_id,
        () if theirs.eos_token_id is None else (theirs.eos_token_id,),
    )
    rope = theirs.rope_parameters
    assert (ours.rope.type, ours.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert ours.rope.factor == rope.get("factor", 1.0)
    if model_type.startswith("qwen"):
        sliding = [kind == "sliding_attention" for kind in theirs.layer_types]
        assert [layer in ours.sliding_layers for layer in range(3)] == sliding
        assert ours.sliding_window == (theirs.sliding_window if any(sliding) else None)
    if model_type == "mistral":
        assert ours.sliding_window == theirs.sliding_window


def test_null_key_value_heads_and_head_dim_are_derived():
    config = LlamaConfig.from_hf(hf("mistral", num_key_value_heads=None, head_dim=None))
    assert (config.num_kv_heads, config.head_dim) == (8, 8)


def test_head_dim_need_not_divide_the_hidden_size():
    assert LlamaConfig.from_hf(hf("qwen3", head_dim=96)).head_dim == 96


@pytest.mark.parametrize(
    ("model_type", "attention_bias", "qkv", "output"),
    [
        ("llama", False, False, False),
        ("llama", True, True, True),
        ("mistral", True, False, False),
        ("qwen2", False, True, False),
        ("qwen3", False, False, False),
        ("qwen3", True, True, True),
    ],
)
def test_attention_biases_by_family(model_type, attention_bias, qkv, output):
    config = LlamaConfig.from_hf(hf(model_type, attention_bias=attention_bias))
    assert (config.qkv_bias, config.output_bias) == (qkv, output)


def test_mlp_bias_belongs_to_llama_alone():
    assert LlamaConfig.from_hf(hf(mlp_bias=True)).mlp_bias
    assert not LlamaConfig.from_hf(hf("qwen2", mlp_bias=True)).mlp_bias


def test_only_qwen3_normalises_queries_and_keys():
    families = ("llama", "mistral", "qwen2", "qwen3")
    assert [LlamaConfig.from_hf(hf(name)).qk_norm for name in families] == [False] * 3 + [True]


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": 500_000, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0}},
        {"rope_parameters": LLAMA3_ROPE, "rope_theta": 500_000.0},
    ],
    ids=["scaling", "both type keys", "parameters", "theta outside"],
)
def test_llama3_rope_in_every_spelling(keys):
    config = LlamaConfig.from_hf(hf(**keys))
    assert config.rope == RopeConfig("llama3", 500_000.0, 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_linear_rope_in_every_spelling(key, place):
    config = LlamaConfig.from_hf(hf(**{place: {key: "linear", "factor": 4}}))
    assert config.rope == RopeConfig("linear", 10_000.0, 4.0)


def test_llama3_rope_without_an_original_length_uses_the_model_length():
    rope = without(LLAMA3_ROPE, "original_max_position_embeddings")
    config = LlamaConfig.from_hf(hf(rope_scaling=rope, max_position_embeddings=700))
    assert config.rope.original_max_position_embeddings == 700


def test_mistral_window_can_be_switched_off():
    assert LlamaConfig.from_hf(hf("mistral", sliding_window=None)).sliding_window is None
    assert LlamaConfig.from_hf(hf("mistral", sliding_window=16)).sliding_window == 16


def test_qwen_window_is_used_only_when_switched_on():
    off = LlamaConfig.from_hf(hf("qwen2", use_sliding_window=False, sliding_window=16))
    on = LlamaConfig.from_hf(
        hf("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    )
    assert (off.sliding_window, off.sliding_layers) == (None, ())
    assert (on.sliding_window, on.sliding_layers) == (16, (1, 2))


@pytest.mark.parametrize(
    ("kinds", "window", "layers"),
    [
        (["full_attention"] * 3, None, ()),
        (["full_attention", "sliding_attention", "full_attention"], 16, (1,)),
    ],
)
def test_layer_types_decide_whether_qwen_slides(kinds, window, layers):
    config = LlamaConfig.from_hf(
        hf("qwen3", use_sliding_window=True, sliding_window=16, layer_types=kinds)
    )
    assert (config.sliding_window, config.sliding_layers) == (window, layers)


def test_llama_has_no_window_even_if_config_names_one():
    assert LlamaConfig.from_hf(hf(sliding_window=16)).sliding_window is None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_under_either_name(key):
    assert LlamaConfig.from_hf(hf(**{key: "float16"})).dtype == "float16"


def test_eos_ids_come_from_both_files(tmp_path):
    write(tmp_path, "config.json", hf(eos_token_id=[7, 9]))
    write(tmp_path, "generation_config.json", {"eos_token_id": [9, 11]})
    assert LlamaConfig.from_hf(tmp_path).eos_token_ids == (7, 9, 11)
    assert LlamaConfig.from_hf(hf(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported .*llama, mistral"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs the key factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "must be above"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"rope_theta": -1}, "rope_theta must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is present"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not a multiple .* \(3\)"),
        ({"head_dim": 9}, "head_dim must be even for RoPE, and is 9"),
        ({"hidden_size": 60}, r"hidden_size \(60\) is not a multiple"),
        ({"hidden_size": None}, "required keys are missing: hidden_size"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, and is 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
        ({"max_window_layers": -1}, "max_window_layers must be an integer of at least 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"bos_token_id": "<s>"}, "bos_token_id must be an integer"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id must be an integer, a list"),
        ({"torch_dtype": "float8"}, "dtype 'float8' is not supported"),
        ({"layer_types": ["sliding_attention"] * 3}, "no sliding window is set"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"layer_types": ["chunked_attention"] * 3}, "unsupported types: chunked_attention"),
        ({"layer_types": "full_attention"}, "layer_types must be a list"),
    ],
    ids=str,
)
def test_refuses(keys, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        LlamaConfig.from_hf(hf(**keys))
    assert str(caught.value).count("\n  - ") == 1


def test_every_reason_is_listed_at_once():
    raw = without(hf(), "vocab_size", "intermediate_size")
    raw |= {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope"},
        "hidden_act": "gelu",
        "quantization_config": {},
        "partial_rotary_factor": 0.5,
    }
    with pytest.raises(ValueError, match="cannot be used") as caught:
        LlamaConfig.from_hf(raw)
    message = str(caught.value)
    for reason in ("phi3", "vocab_size, intermediate_size", "longrope", "gelu", "quant", "0.5"):
        assert reason in message
    assert message.count("\n  - ") == 6


def test_a_config_without_a_model_type_is_refused():
    with pytest.raises(ValueError, match="the key model_type is missing"):
        LlamaConfig.from_hf(without(hf(), "model_type"))


@pytest.mark.parametrize("content", ["{'vocab_size': 5}", "", "{"])
def test_a_config_that_is_not_json_is_named(tmp_path, content):
    write(tmp_path, "config.json", content)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        LlamaConfig.from_hf(tmp_path)


def test_a_config_that_is_not_an_object_is_named(tmp_path):
    write(tmp_path, "config.json", [1, 2])
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object.* list"):
        LlamaConfig.from_hf(tmp_path)


def test_a_bad_generation_config_is_named(tmp_path):
    write(tmp_path, "config.json", hf())
    write(tmp_path, "generation_config.json", {"eos_token_id": "</s>"})
    with pytest.raises(ValueError, match=r"eos_token_id of generation_config\.json"):
        LlamaConfig.from_hf(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no config.json at .*config.json"):
        LlamaConfig.from_hf(tmp_path)


@st.composite
def configs(draw):
    """Any configuration that config.json can express."""
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    layers = draw(st.integers(1, 4))
    model_type = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    raw = hf(
        model_type,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6, 0.0])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        use_sliding_window=draw(st.booleans()),
        sliding_window=draw(st.integers(1, 99)),
        max_window_layers=draw(st.integers(0, 4)),
        torch_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        bos_token_id=draw(st.none() | st.integers(0, 9)),
        eos_token_id=draw(st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9))),
        rope_theta=draw(st.floats(1.0, 1e7)),
        rope_scaling=draw(st.sampled_from([None, LLAMA3_ROPE, {"type": "linear", "factor": 3.0}])),
    )
    if model_type.startswith("qwen") and raw["use_sliding_window"] and draw(st.booleans()):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        raw["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    return LlamaConfig.from_hf(raw)


@settings(deadline=None, max_examples=100)
@given(configs())
def test_written_config_reads_back_the_same(config):
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@settings(deadline=None, max_examples=25)
@given(configs())
def test_transformers_reads_the_written_config_alike(config):
    transformers = pytest.importorskip("transformers")
    if config.eos_token_ids and len(config.eos_token_ids) > 1:
        config = LlamaConfig.from_hf({**config.to_hf(), "eos_token_id": config.eos_token_ids[0]})
    if config.hidden_size % config.num_heads:
        config = LlamaConfig.from_hf({**config.to_hf(), "hidden_size": config.num_heads * 8})
    theirs = transformers.CONFIG_MAPPING[config.model_type].from_dict(config.to_hf())
    read = theirs.to_dict()
    read["dtype"] = str(read["dtype"]).removeprefix("torch.")
    if theirs.rope_parameters["rope_type"] == "llama3":
        assert math.isclose(theirs.rope_parameters["factor"], config.rope.factor)
    assert LlamaConfig.from_hf(read) == config


def test_a_combination_that_config_json_cannot_express_is_refused():
    config = LlamaConfig.from_hf(hf("qwen2"))
    unusual = LlamaConfig(**{**vars(config), "qkv_bias": False})
    with pytest.raises(ValueError, match="model_type 'qwen2' cannot express"):
        unusual.to_hf()


def test_a_window_without_named_layers_is_written_for_all_layers():
    config = LlamaConfig.from_hf(hf("mistral", sliding_window=16))
    unnamed = LlamaConfig(**{**vars(config), "sliding_layers": ()})
    assert unnamed.to_hf() == config.to_hf()
