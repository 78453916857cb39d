"""What a user can ask of a loaded model, and what each mistake answers."""

import inspect
import shutil
from dataclasses import fields, replace

import jax.numpy as jnp
import numpy as np
import pytest
from calibrations import TEXT, random_calibration
from toy import load_quietly, toy_config, toy_parameters, write_toy

import h1bjax
from h1bjax.cache import UNCALIBRATED, CacheSpec
from h1bjax.calibration_file import save_calibration
from h1bjax.decoder import Decoder, fold_value_rotation
from h1bjax.model import Model
from h1bjax.request import GenerateOptions, encode_prompts

CHAT = [{"role": "user", "content": "the end?"}]


@pytest.fixture(scope="module")
def exact(toy_folder):
    return load_quietly(toy_folder)


# Loading


def test_a_model_is_its_config_cache_and_tokenizer(toy_folder):
    model = load_quietly(toy_folder, "h1b-signs")
    assert model.config == toy_config()
    assert model.spec is CacheSpec.preset("h1b-signs")
    assert model.tokenizer.decode(model.tokenizer.encode("the end")) == "the end"


def test_the_dtype_is_the_checkpoints_unless_chosen(toy_folder, exact):
    assert exact.decoder.dtype == jnp.float32
    assert h1bjax.load(toy_folder, cache="exact", dtype="bfloat16").decoder.dtype == jnp.bfloat16


def test_an_uncalibrated_cache_warns(toy_folder):
    with pytest.warns(UserWarning, match="'h1b-signs' is not calibrated"):
        h1bjax.load(toy_folder, cache="h1b-signs")


@pytest.mark.parametrize("name", UNCALIBRATED)
def test_a_preset_of_as_many_bytes_stands_in_for_an_uncalibrated_one(toy_folder, name):
    wanted, instead = CacheSpec.preset(name), CacheSpec.preset(UNCALIBRATED[name])
    with pytest.warns(UserWarning, match=f"'{name}' is not calibrated.*'{instead.name}'"):
        assert h1bjax.load(toy_folder, cache=name).spec is instead
    assert instead.bytes_per_token(128) == wanted.bytes_per_token(128)


def test_what_stands_in_is_calibrated_if_it_can_be(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "toy")
    calibration = random_calibration(CacheSpec.preset("h1b-signs"))
    save_calibration(folder, calibration, TEXT)
    codec = load_quietly(folder, "h1b").decoder.codec
    np.testing.assert_array_equal(codec.projection[...], calibration.codec.projection[...])


@pytest.mark.parametrize("cache", ["exact", "kivi-2", "sinks-window"])
def test_a_cache_without_sketches_needs_no_calibration(toy_folder, cache):
    assert h1bjax.load(toy_folder, cache=cache).decoder.codec is None


def test_a_cache_that_does_not_take_the_models_head_dimension_is_refused(tmp_path):
    folder = write_toy(tmp_path, head_dim=16)
    with pytest.raises(ValueError, match="a head dimension that is a multiple of 32, got 16"):
        h1bjax.load(folder, cache="kivi-2")


def test_a_spec_of_ones_own_is_a_cache(toy_folder):
    spec = CacheSpec.preset("h1b-signs").replace(name="mine", sinks=2, window=30)
    with pytest.warns(UserWarning, match="'mine' is not calibrated"):
        assert h1bjax.load(toy_folder, cache=spec).spec is spec


def test_the_seed_decides_the_projections(toy_folder):
    def projections(seed):
        with pytest.warns(UserWarning, match="not calibrated"):
            codec = h1bjax.load(toy_folder, seed=seed).decoder.codec
        assert codec is not None
        return np.asarray(codec.projection[...])

    np.testing.assert_array_equal(projections(1), projections(1))
    assert not np.array_equal(projections(1), projections(2))


@pytest.mark.parametrize(
    "spec", [CacheSpec.preset("h1b").replace(name="mine", scores="fitted")], ids=["fitted scores"]
)
def test_a_cache_that_needs_calibration_is_refused(toy_folder, spec):
    with pytest.raises(ValueError, match="'mine' needs a calibration, and there is none"):
        h1bjax.load(toy_folder, cache=spec)


def test_an_unknown_preset_lists_the_known(toy_folder):
    with pytest.raises(ValueError, match=r"'h2b'; choose one of exact, h1b-paper, h1b"):
        h1bjax.load(toy_folder, cache="h2b")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-model"):
        h1bjax.load(tmp_path / "no-model", cache="exact")


def test_a_model_without_tokenizer_takes_and_gives_token_ids(untokenized_folder, exact):
    model = load_quietly(untokenized_folder)
    assert model.tokenizer is None
    out = model.generate([5, 6, 7], max_new_tokens=4)
    assert out.text is None
    assert out.tokens == exact.generate([5, 6, 7], max_new_tokens=4).tokens
    assert [step.text for step in model.stream([5, 6, 7], max_new_tokens=2)] == [None, None]


def test_names_of_the_package_are_importable_and_listed():
    assert set(h1bjax.__all__) <= set(dir(h1bjax))
    for name in h1bjax.__all__:
        assert getattr(h1bjax, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        h1bjax.no_such_name  # noqa: B018


# Saving


def test_a_saved_model_loads_and_continues_alike(tmp_path, toy_folder, exact):
    exact.save_pretrained(tmp_path / "copy", source=toy_folder)
    copy = h1bjax.load(tmp_path / "copy", cache="exact")
    prompts = ["the end", "once"]
    ours = exact.generate(prompts, max_new_tokens=8)
    assert copy.generate(prompts, max_new_tokens=8).tokens == ours.tokens
    assert copy.config == exact.config
    assert copy.tokenizer is not None
    assert copy.tokenizer.special_tokens == exact.tokenizer.special_tokens


# Rotated values


@pytest.mark.parametrize("keys", [{}, {"model_type": "qwen2"}], ids=["llama", "qwen2 with biases"])
def test_rotated_values_are_the_same_function(keys):
    config = toy_config(**{"num_key_value_heads": 2, **keys})
    parameters = toy_parameters(config)
    generator = np.random.default_rng(1)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim, config.head_dim)
    rotation = np.linalg.qr(generator.standard_normal(shape))[0]
    folded = fold_value_rotation(config, parameters, jnp.asarray(rotation, jnp.float32))
    assert np.abs(folded["value"] - parameters["value"]).max() > 0.1
    tokens = jnp.asarray(generator.integers(0, config.vocab_size, (1, 12)), jnp.int32)
    positions = jnp.arange(12)[None]
    expected, _ = Decoder(config, parameters)(tokens, positions)
    logits, _ = Decoder(config, folded)(tokens, positions)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("cache", ["h1b-v2", "h1b-v3"])
def test_presets_with_rotated_values_load_rotated_weights(toy_folder, exact, cache):
    model = load_quietly(toy_folder, cache)
    tokens, positions = jnp.arange(5, 17)[None], jnp.arange(12)[None]
    assert np.abs(model.decoder.layers.value[...] - exact.decoder.layers.value[...]).max() > 0.1
    # Without a cache attention is exact, whatever the preset.
    logits, _ = model.decoder(tokens, positions)
    expected, _ = exact.decoder(tokens, positions)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


# Prompts


def test_one_prompt_is_a_batch_of_one(exact):
    tokenizer = exact.tokenizer
    ids = tokenizer.encode("the end")
    chat = tokenizer.apply_chat_template(CHAT)
    assert tokenizer.decode(chat) == "user: the end?assistant: "
    for prompt, expected in [("the end", ids), (ids, ids), (tuple(ids), ids), (CHAT, chat)]:
        assert encode_prompts(prompt, tokenizer, continued=False) == [expected]
        assert encode_prompts([prompt, "the"], tokenizer, continued=False)[0] == expected


def test_text_gets_special_tokens_only_at_the_beginning(bos_folder):
    tokenizer = load_quietly(bos_folder).tokenizer
    (first,) = encode_prompts("the end", tokenizer, continued=False)
    (later,) = encode_prompts("the end", tokenizer, continued=True)
    assert first == [tokenizer.bos_token_id, *later]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ("", "prompt 0 is empty"),
        (["the", ""], "prompt 1 is empty"),
        ([[5], []], "prompt 1 is empty"),
        ([5, "the"], r"not \[5, 'the'\]"),
        ([[5, "the"]], "sequence of token ids or of chat messages"),
        ([None], "not None"),
        ([[5], [300, 6, -1]], r"prompt 1 .* vocabulary of 300: \[300, -1\]"),
    ],
)
def test_bad_prompts_are_named(exact, prompts, message):
    with pytest.raises(ValueError, match=message):
        exact.generate(prompts)


@pytest.mark.parametrize("prompt", ["the", CHAT], ids=["text", "chat"])
def test_text_without_a_tokenizer_is_refused(untokenized_folder, prompt):
    with pytest.raises(ValueError, match="no tokenizer; give prompts as token ids"):
        load_quietly(untokenized_folder).generate(prompt)


# Options


def test_stream_and_generate_have_the_same_defaults():
    parameters = inspect.signature(Model.generate).parameters
    defaults = {field.name: field.default for field in fields(GenerateOptions)}
    assert defaults == {name: parameters[name].default for name in defaults}
    assert set(parameters) - set(defaults) == {"self", "prompts", "logprobs"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3 must be at least 1"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"top_k": -1, "top_p": 0.0, "min_p": 1.0}, "top_k .*top_p .*min_p"),
        ({"stop_ids": [5, 300, -1]}, r"stop_ids outside the vocabulary of 300: \[300, -1\]"),
        ({"stop": "end"}, r"write \['end'\]"),
        ({"stop": [""]}, "non-empty"),
        ({"max_new_tokens": 10, "max_length": 11}, "max_length=11 .* needs 12 tokens, 10 of them"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_options_are_named(exact, method, options, message):
    with pytest.raises(ValueError, match=message):
        list(getattr(exact, method)([[5, 6]], **options))


def test_an_unknown_option_of_a_stream_is_refused(exact):
    with pytest.raises(TypeError, match="max_tokens"):
        list(exact.stream("the", max_tokens=3))


def test_stop_strings_need_a_tokenizer(untokenized_folder):
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        load_quietly(untokenized_folder).generate([5], stop=["end"])


def test_a_cache_is_continued_with_as_many_prompts(exact):
    cache = exact.decoder.init_cache(batch=2, max_length=20)
    with pytest.raises(ValueError, match="3 prompts for a cache of 2 rows"):
        exact.generate([[5], [6], [7]], cache=cache)


def test_a_cache_is_continued_by_the_codec_that_wrote_it(toy_folder, exact):
    cache = load_quietly(toy_folder, "h1b-signs").decoder.init_cache(batch=1, max_length=20)
    with pytest.raises(ValueError, match=r"'h1b-signs'.*'exact'"):
        exact.generate([5], cache=cache)


def test_generating_beyond_the_trained_length_warns(exact):
    model = replace(exact, decoder=with_config(exact, max_position_embeddings=8))
    with pytest.warns(UserWarning, match="up to 9 tokens with a model made for 8"):
        model.generate([5], max_new_tokens=8)


def test_generating_beyond_a_sliding_window_is_refused(tmp_path):
    write_toy(tmp_path, model_type="mistral", sliding_window=64)
    model = load_quietly(tmp_path)
    with pytest.raises(ValueError, match=r"max_length=65 exceeds .*sliding window of 64"):
        model.generate([5], max_new_tokens=64)


# Numbers


def with_config(model, **changes):
    decoder = model.decoder
    return Decoder(replace(decoder.config, **changes), decoder.parameters())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_raise(exact, value):
    parameters = exact.decoder.parameters()
    parameters["final_norm"] = parameters["final_norm"].at[3].set(value)
    broken = replace(exact, decoder=Decoder(exact.config, parameters))
    with pytest.raises(FloatingPointError, match="row 0 are not finite"):
        broken.generate("the", max_new_tokens=2)
    with pytest.raises(FloatingPointError, match="row 0 are not finite"):
        list(broken.stream("the", max_new_tokens=2))
