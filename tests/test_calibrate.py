"""Calibration of a whole model: which text it reads, what it fits, and what it refuses."""

from functools import partial

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_parameters, small_config

from h1bjax.cache import (
    PRESETS,
    CacheSpec,
    GaussianSigns,
    LinearCode,
    OrthogonalSigns,
    QuantisedValues,
    TwoPlanes,
)
from h1bjax.calibrate import calibrate, calibration_windows
from h1bjax.decoder import Decoder, init_codec
from h1bjax.rope import rope_frequencies
from h1bjax.tokenizer import Tokenizer

pytestmark = pytest.mark.once

CONTEXT = 80
TEXT = "".join(f"{number} squared is {number * number}.\n" for number in range(400))


# Windows of text


@pytest.fixture(scope="module")
def plain(toy_folder):
    """A tokenizer without a BOS, for which a byte is a token."""
    return Tokenizer.from_pretrained(toy_folder)


@pytest.fixture(scope="module")
def with_bos(bos_folder):
    return Tokenizer.from_pretrained(bos_folder)


def test_each_window_begins_with_a_bos_where_the_tokenizer_adds_one(plain, with_bos):
    windows = calibration_windows(with_bos, [TEXT], context=30, tokens=300, seed=0)
    assert windows.dtype == np.int32
    assert windows.shape == (10, 30)
    assert (windows[:, 0] == with_bos.bos_token_id).all()
    assert not (windows[:, 1:] == with_bos.bos_token_id).any()
    windows = calibration_windows(plain, [TEXT], context=30, tokens=300, seed=0)
    assert windows.shape == (10, 30)
    assert not (windows == with_bos.bos_token_id).any()


def test_a_short_document_is_read_from_its_beginning(plain, with_bos):
    for tokenizer in (plain, with_bos):
        document = TEXT[:300]
        windows = calibration_windows(tokenizer, [document], context=40, tokens=120, seed=3)
        stream = windows[:, 1 if tokenizer.adds_bos else 0 :].ravel()
        np.testing.assert_array_equal(stream, tokenizer.encode_plain(document)[: stream.size])
        assert len(windows) == 3


def test_windows_come_from_random_places_of_all_documents(plain):
    documents = ["abc" * 2000, "xyz" * 2000]
    many = calibration_windows(plain, documents, context=20, tokens=4000, seed=0)
    first, again, other = (
        calibration_windows(plain, [TEXT], context=20, tokens=200, seed=seed) for seed in (0, 0, 1)
    )
    assert {plain.decode(row)[0] in "abc" for row in many} == {True, False}
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_text_is_read_twice_and_none_is_left_out(plain):
    letters = [f"{chr(97 + index)}" * 320 for index in range(26)]
    windows = calibration_windows(plain, letters, context=20, tokens=10**6, seed=0)
    assert windows.shape == (26 * 320 // 20, 20)
    read = plain.decode(windows.ravel())
    assert sorted(read) == sorted("".join(letters))
    assert read != "".join(letters)


@pytest.mark.parametrize(("tokens", "count"), [(100, 1), (199, 1), (200, 2), (10**9, 4)])
def test_tokens_are_rounded_down_to_whole_windows(plain, tokens, count):
    windows = calibration_windows(plain, [TEXT[:450]], context=100, tokens=tokens, seed=0)
    assert windows.shape == (count, 100)


def test_special_tokens_written_out_become_their_ids(plain):
    windows = calibration_windows(plain, ["one</s>two" * 10], context=7, tokens=7, seed=0)
    assert windows.tolist()[0].count(plain.eos_token_id) == 1


@pytest.mark.parametrize("documents", [[], [""], ["much too short"], ["a", "b"]])
def test_text_shorter_than_a_window_is_refused(plain, documents):
    have = len("".join(documents))
    with pytest.raises(ValueError, match=f"text has {have} tokens, fewer than one window of 64"):
        calibration_windows(plain, documents, context=64, tokens=640, seed=0)


def test_fewer_tokens_than_a_window_are_refused(plain):
    with pytest.raises(ValueError, match="63 tokens are fewer than one window of 64"):
        calibration_windows(plain, [TEXT], context=64, tokens=63, seed=0)


@pytest.mark.parametrize("context", [-1, 0, 1])
def test_windows_without_room_for_text_are_refused(plain, with_bos, context):
    for tokenizer in (plain, with_bos):
        with pytest.raises(ValueError, match=f"context={context} must be at least 2 tokens"):
            calibration_windows(tokenizer, [TEXT], context=context, tokens=64, seed=0)


# The model's pass over the text


def peculiar_decoder(dtype=jnp.float32, **changes) -> Decoder:
    """A model whose keys are far from isotropic, as are those of trained models."""
    config = small_config(head_dim=64, qkv_bias=True, **changes)
    parameters = random_parameters(config)
    rng = np.random.default_rng(1)
    shape = (config.num_layers, 1, 1, 64)
    # Both channels of a RoPE pair have the same size, so that positions do not mix sizes.
    size = np.tile((1.0 + rng.permutation(32)) ** -1.0, 2)
    for name, factor in (("query", 3.0), ("key", 8.0)):
        spread = factor * size * np.exp(0.3 * rng.normal(size=shape))
        parameters[name] = parameters[name] * jnp.asarray(spread, jnp.float32)
    bias = 2.0 * rng.normal(size=(config.num_layers, config.num_kv_heads, 64))
    parameters["key_bias"] = jnp.asarray(bias, jnp.float32)
    return Decoder(config, {name: array.astype(dtype) for name, array in parameters.items()})


def random_windows(count, context=CONTEXT, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (count, context)).astype(np.int32)


@pytest.fixture(scope="module")
def decoder():
    return peculiar_decoder()


@pytest.fixture(scope="module")
def windows():
    return random_windows(6)


def test_layers_traced_one_by_one_are_the_model(decoder, windows):
    positions = np.tile(np.arange(CONTEXT, dtype=np.int32), (len(windows), 1))
    expected = decoder.layer_outputs(windows, positions)
    stream = decoder.embed(windows)
    np.testing.assert_array_equal(stream, expected[0])
    for layer in range(decoder.config.num_layers):
        stream, query, key = decoder.trace_layer(jnp.int32(layer), stream)
        np.testing.assert_allclose(stream, expected[layer + 1], atol=1e-4)
        for array, name in ((query, "query"), (key, "key")):
            by_hand = turned(decoder, layer, np.asarray(expected[layer]), name)
            np.testing.assert_allclose(array, by_hand, atol=1e-3)


def turned(decoder, layer, x, name) -> np.ndarray:
    """Queries or keys of a layer after RoPE, in float64."""
    weights = {key: np.asarray(array[layer]) for key, array in stacked(decoder).items()}
    x = x.astype(np.float64)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + decoder.config.rms_norm_eps)
    heads = np.einsum("bte,ehd->bthd", x * weights["attention_norm"], weights[name])
    positions = np.arange(x.shape[1])[:, None]
    heads = heads + weights[f"{name}_bias"]
    return float64.rotate(heads, positions, rope_frequencies(decoder.config))


def stacked(decoder):
    parameters = decoder.parameters()
    return {name: parameters[name] for name in parameters if name.startswith(("att", "que", "key"))}


# What is fitted

FOUR_BITS = QuantisedValues(4)
SIGNS = CacheSpec("signs", OrthogonalSigns(), FOUR_BITS, 4, 12, "corrected")
SPECS = (
    SIGNS,
    SIGNS.replace(name="signs, 2-bit values", values=QuantisedValues(2, rotated=True)),
    CacheSpec("planes, 128", TwoPlanes(), FOUR_BITS, 4, 12, "fitted", 128),
    CacheSpec("paper", GaussianSigns(), FOUR_BITS, scores="fitted"),
    CacheSpec("linear ½, 64", LinearCode(0.5), FOUR_BITS, 4, 12, "raw", 64),
    CacheSpec("linear 1", LinearCode(1.0), FOUR_BITS, 4, 12),
    CacheSpec("linear 2, 32", LinearCode(2.0, scaled=False), FOUR_BITS, 4, 12, "fitted", 32),
    CacheSpec("exact keys", None, QuantisedValues(2, rotated=True), 4, 12),
)
every_sketch = pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.sketch is not None], ids=lambda spec: spec.name
)


@pytest.fixture(scope="module")
def calibrations(decoder, windows):
    found = calibrate(decoder, windows, SPECS, seed=5)
    assert [calibration.spec for calibration in found] == list(SPECS)
    return {calibration.spec.name: calibration for calibration in found}


@every_sketch
def test_a_fit_is_of_the_form_that_the_decoder_takes(decoder, calibrations, spec):
    fitted = calibrations[spec.name].codec
    expected = jax.eval_shape(partial(init_codec, decoder.config, spec), jax.random.key(0))
    assert str(jax.tree.structure(fitted)) == str(jax.tree.structure(expected))
    for ours, theirs in zip(jax.tree.leaves(fitted), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert np.isfinite(ours).all()
    Decoder(decoder.config, decoder.parameters(), spec, fitted)


@every_sketch
def test_the_mean_is_that_of_the_keys_as_they_are_stored(decoder, windows, calibrations, spec):
    fitted = np.asarray(calibrations[spec.name].codec.mean[...])
    if isinstance(spec.keys, GaussianSigns):
        assert not fitted.any()
        return
    frequencies, position = rope_frequencies(decoder.config), np.arange(CONTEXT)
    stream = decoder.embed(windows)
    for layer in range(decoder.config.num_layers):
        stream, _, keys = decoder.trace_layer(jnp.int32(layer), stream)
        keys = np.asarray(keys, np.float64)
        if spec.rope_period is not None:
            begin = position - position % spec.rope_period
            keys = float64.rotate(keys, -begin[:, None], frequencies)
        np.testing.assert_allclose(fitted[layer], keys.mean(axis=(0, 1)), atol=2e-3)


def test_caches_that_share_a_codec_share_its_fit(calibrations):
    one, other = calibrations["signs"], calibrations["signs, 2-bit values"]
    for ours, theirs in zip(jax.tree.leaves(one.codec), jax.tree.leaves(other.codec), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_values_are_rotated_where_their_codec_asks_for_it(decoder, calibrations):
    assert calibrations["signs"].rotation is None
    assert calibrations["exact keys"].codec is None
    rotation = np.asarray(calibrations["exact keys"].rotation)
    np.testing.assert_array_equal(rotation, calibrations["signs, 2-bit values"].rotation)
    config = decoder.config
    assert rotation.shape == (config.num_layers, config.num_kv_heads, 64, 64)
    product = np.einsum("lkcd,lked->lkce", rotation, rotation)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(64), product.shape), atol=1e-5)


def test_only_fitted_scores_have_a_temperature(calibrations):
    for name, calibration in calibrations.items():
        if calibration.codec is not None:
            neutral = calibration.spec.scores != "fitted"
            assert (calibration.codec.temperature[...] == 1).all() == neutral, name
            assert (calibration.codec.offset[...] == 0).all() == neutral, name


@jax.jit
def divergence(model, tokens, positions):
    """Mean KL of the next token's distribution from that with exact attention."""
    exact, compressed = (
        jax.nn.log_softmax(model(tokens, positions, compressed=compressed)[0])
        for compressed in (False, True)
    )
    return jnp.mean(jnp.sum(jnp.exp(exact) * (exact - compressed), axis=-1))


@every_sketch
def test_a_fit_brings_unseen_text_nearer_to_exact_attention(decoder, calibrations, spec):
    tokens = random_windows(4, seed=100)
    positions = np.tile(np.arange(CONTEXT, dtype=np.int32), (len(tokens), 1))
    exact_values = spec.replace(values=None)

    def distance(codec):
        model = Decoder(decoder.config, decoder.parameters(), exact_values, codec)
        return float(divergence(model, tokens, positions))

    start = init_codec(decoder.config, spec, jax.random.key(0))
    assert distance(calibrations[spec.name].codec) < 0.9 * distance(start)


# Seeds and sizes

SMALL = CacheSpec("small", LinearCode(0.5), FOUR_BITS, 2, 6, "fitted")


def leaves(calibrations):
    return [np.asarray(leaf) for leaf in jax.tree.leaves([c.codec for c in calibrations])]


@pytest.mark.slow
def test_the_seed_alone_decides_the_fit(decoder):
    windows = random_windows(3, 40)
    specs = [SMALL.replace(keys=OrthogonalSigns(32)), PRESETS["exact"]]
    first, other = (calibrate(decoder, windows, specs, seed=seed) for seed in (0, 1))
    _, *again = calibrate(decoder, windows, [SMALL, *specs], seed=0)
    for ours, theirs in zip(leaves(first), leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    different = zip(leaves(first), leaves(other), strict=True)
    assert any(not np.array_equal(ours, theirs) for ours, theirs in different)


@pytest.mark.slow
def test_the_batch_does_not_change_the_fit(decoder):
    windows = random_windows(5, 40)
    one, many = (calibrate(decoder, windows, [SMALL], batch=batch)[0].codec for batch in (1, 4))
    assert one is not None
    assert many is not None
    assert one.levels is not None
    assert many.levels is not None
    np.testing.assert_allclose(one.mean[...], many.mean[...], atol=1e-4)
    np.testing.assert_allclose(one.temperature[...], many.temperature[...], atol=0.01)
    np.testing.assert_array_equal(one.levels[...], many.levels[...])


def test_a_bfloat16_model_is_fitted_in_float32(windows):
    calibration = calibrate(peculiar_decoder(jnp.bfloat16), windows[:2], [SMALL])[0]
    for leaf in jax.tree.leaves(calibration.codec):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()


# What is refused


def test_no_cache_is_no_work(decoder, windows):
    assert calibrate(decoder, windows, []) == []


def test_a_decoder_that_compresses_already_is_refused(decoder, windows):
    codec = init_codec(decoder.config, SIGNS, jax.random.key(0))
    compressed = Decoder(decoder.config, decoder.parameters(), SIGNS, codec)
    with pytest.raises(ValueError, match="a decoder with the exact cache, not 'signs'"):
        calibrate(compressed, windows, [SIGNS])


@pytest.mark.parametrize("shape", [(0, 80), (3, 0), (80,), (1, 2, 80)])
def test_windows_must_be_a_matrix_with_something_in_it(decoder, shape):
    with pytest.raises(ValueError, match="windows must be a non-empty matrix"):
        calibrate(decoder, np.zeros(shape, np.int32), [SIGNS])


@pytest.mark.parametrize(("token", "lowest", "highest"), [(50, 7, 50), (-1, -1, 7)])
def test_tokens_outside_of_the_vocabulary_are_refused(decoder, token, lowest, highest):
    windows = np.full((2, CONTEXT), 7, np.int32)
    windows[1, 5] = token
    with pytest.raises(ValueError, match=f"from {lowest} to {highest} exceed .* of 50"):
        calibrate(decoder, windows, [SIGNS])


def test_windows_that_no_sketch_is_read_in_are_refused(decoder):
    with pytest.raises(ValueError, match="16 tokens lie within the 16 that the cache 'signs'"):
        calibrate(decoder, random_windows(2, 16), [SMALL, SIGNS])
    assert len(calibrate(decoder, random_windows(2, 9), [SMALL])) == 1


def test_windows_longer_than_the_sliding_window_are_refused():
    decoder = peculiar_decoder(sliding_window=40)
    with pytest.raises(ValueError, match="80 tokens exceed the model's sliding window of 40"):
        calibrate(decoder, random_windows(2), [SIGNS])


def test_an_empty_batch_is_refused(decoder, windows):
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        calibrate(decoder, windows, [SIGNS], batch=0)


@pytest.mark.parametrize("name", ["query", "key"])
def test_a_layer_that_is_not_finite_is_named(decoder, name):
    parameters = decoder.parameters()
    parameters[name] = parameters[name].at[1, 0, 0, 0].set(jnp.nan)
    broken = Decoder(decoder.config, parameters)
    with pytest.raises(FloatingPointError, match="queries or keys of layer 1 are not finite"):
        calibrate(broken, random_windows(2, 40), [SMALL])
