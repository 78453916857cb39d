"""A prompt through fused attention leaves the same outputs and the same cache as any other way."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_parameters, small_config
from test_agreement import (
    LAYER,
    LENGTHS,
    SPECS,
    TOKENS,
    assert_agree,
    codec_for,
    dense,
    empty,
    every_spec,
    frequencies_for,
    plain_attention,
    sequence,
    specs,
)

from h1bjax import generate as generation
from h1bjax.cache import (
    CacheSpec,
    KVCache,
    append_and_attend,
    attend,
    choose_prefill,
    fill_and_attend,
)
from h1bjax.cache.rows import attention_channels
from h1bjax.decoder import Decoder, init_codec
from h1bjax.fused_attention import Choice

pytestmark = pytest.mark.once

filling = jax.jit(fill_and_attend, static_argnames=("exact_chunk", "implementation"))
appending = jax.jit(append_and_attend)


def fill(spec: CacheSpec, cache: KVCache, *, dtype=jnp.float32, exact_chunk=False, begin=LENGTHS):
    """The first tokens of each row: their outputs, and the cache."""
    tokens, positions = sequence(spec, dtype=dtype)
    positions = jnp.where(positions < np.asarray(begin)[:, None], positions, -1)
    output, cache = filling(
        cache,
        LAYER,
        *tokens,
        positions,
        codec_for(spec),
        frequencies_for(spec),
        exact_chunk=exact_chunk,
        implementation="xla",
    )
    return np.asarray(output), cache.advance(positions)


def arrays(cache: KVCache) -> dict[str, np.ndarray]:
    return {
        field.name: np.asarray(value)
        for field in dataclasses.fields(cache)
        if isinstance(value := getattr(cache, field.name), jax.Array)
    }


@every_spec
def test_outputs_are_the_dense_form(spec):
    output, _ = fill(spec, empty(spec, 2, jnp.float32))
    assert_agree(output, dense(spec))


@pytest.mark.parametrize(
    "spec",
    specs(
        *("h1b", "h1b-2plane-v2", "kivi-2", "sinks-window"),
        *("linear, period 32, fitted", "exact keys", "grouped values"),
    ),
)
def test_the_cache_is_the_one_that_appending_leaves(spec):
    before = empty(spec, 2, jnp.float32)
    tokens, positions = sequence(spec)
    _, filled = fill(spec, before)
    _, appended = appending(
        before, LAYER, *tokens, positions, codec_for(spec), frequencies_for(spec)
    )
    expected = arrays(appended.advance(positions))
    assert expected["lengths"].tolist() == list(LENGTHS)
    for name, array in arrays(filled).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("spec", specs("h1b", "kivi-2", "sinks-window"))
def test_decoding_goes_on_from_a_filled_cache(spec):
    begin = (90, 33)
    _, cache = fill(spec, empty(spec, 2, jnp.float32), begin=begin)
    tokens, _ = sequence(spec)
    for step in range(10):
        positions = np.asarray(begin)[:, None] + step
        one = (np.take_along_axis(x, positions[..., None, None], axis=1) for x in tokens)
        output, cache = appending(
            cache, LAYER, *one, positions, codec_for(spec), frequencies_for(spec)
        )
        cache = cache.advance(positions)
        expected = np.take_along_axis(dense(spec), positions[..., None, None], axis=1)
        assert_agree(output, expected)


@pytest.mark.parametrize("begin", [(0, 65), (64, 11)])
@pytest.mark.parametrize("spec", specs("h1b", "kivi-2", "no window"))
def test_rows_of_any_length_are_the_dense_form(spec, begin):
    output, cache = fill(spec, empty(spec, 2, jnp.float32), begin=begin)
    assert cache.lengths.tolist() == list(begin)
    for row, length in enumerate(begin):
        assert_agree(output[row, :length], dense(spec)[row, :length])
        assert not output[row, length:].any()


@pytest.mark.parametrize("spec", specs("exact", "linear, period 32, fitted", "kivi-2"))
def test_an_exact_prefill_is_plain_attention_and_leaves_the_same_cache(spec):
    before = empty(spec, 2, jnp.float32)
    tokens, positions = sequence(spec)
    output, cache = fill(spec, before, exact_chunk=True)
    assert_agree(output, plain_attention(tokens, positions))
    expected = arrays(fill(spec, before)[1])
    for name, array in arrays(cache).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("spec", specs("h1b-2plane", "linear, period 32, fitted"))
def test_bfloat16_agrees_to_its_own_precision(spec):
    output, _ = fill(spec, empty(spec, 2, jnp.bfloat16), dtype=jnp.bfloat16)
    assert output.dtype == jnp.bfloat16
    found, expected = (x.astype(np.float32) for x in (output, dense(spec, dtype=jnp.bfloat16)))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 2**-7


def test_a_bucket_longer_than_the_cache_writes_what_there_is_room_for():
    spec = SPECS["h1b"]
    tokens, positions = sequence(spec)
    wide = [np.pad(x, ((0, 0), (0, 60), (0, 0), (0, 0)), constant_values=7) for x in tokens]
    cache = empty(spec, 2, jnp.float32)
    assert wide[0].shape[1] > cache.capacity
    output, cache = filling(
        cache,
        LAYER,
        *wide,
        np.pad(positions, ((0, 0), (0, 60)), constant_values=-1),
        codec_for(spec),
        frequencies_for(spec),
        exact_chunk=False,
        implementation="xla",
    )
    assert_agree(output[:, :TOKENS], dense(spec))
    expected = arrays(fill(spec, empty(spec, 2, jnp.float32))[1])
    for name in expected.keys() - {"lengths"}:
        np.testing.assert_array_equal(arrays(cache)[name], expected[name], err_msg=name)


def test_there_is_no_silently_wrong_gradient():
    spec = SPECS["h1b"]
    (query, keys, values), positions = sequence(spec)
    others = positions, codec_for(spec), frequencies_for(spec)

    def total(query):
        output, _ = fill_and_attend(
            empty(spec, 2, jnp.float32),
            LAYER,
            query,
            keys,
            values,
            *others,
            exact_chunk=False,
            implementation="xla",
        )
        return jnp.sum(output)

    with pytest.raises(NotImplementedError, match="no gradient; differentiate"):
        jax.grad(total)(jnp.asarray(query))


# The choice


class Hopper:
    compute_capability = "9.0"


class Ampere:
    compute_capability = "8.0"


@pytest.mark.parametrize(
    ("name", "head_dim", "device", "exact", "expected"),
    [
        ("exact", 128, Hopper, False, "cudnn"),
        ("h1b", 256, Hopper, False, "cudnn"),
        ("h1b-signs", 256, Hopper, False, "xla"),
        ("h1b-signs", 256, Hopper, True, "cudnn"),
        ("h1b-signs", 128, Hopper, False, "cudnn"),
        ("h1b-signs", 128, Ampere, False, "xla"),
        ("h1b-paper", 128, Hopper, False, "cudnn"),
        ("h1b-paper", 128, Ampere, False, "xla"),
        ("h1b-unscaled-p32", 128, Hopper, False, "cudnn"),
        ("h1b-unscaled-p32", 256, Hopper, False, "xla"),
        ("h1b-p32", 128, Ampere, False, "cudnn"),
    ],
)
def test_what_cudnn_cannot_take_is_read_from_the_store(
    monkeypatch, name, head_dim, device, exact, expected
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device()])
    spec = SPECS[name]
    choice = choose_prefill(spec, jnp.bfloat16, head_dim, exact=exact)
    assert choice.implementation == expected
    if expected == "xla":
        assert f"not {attention_channels(spec, head_dim)}" in choice.reason


# A whole decoder


@pytest.fixture
def fused(monkeypatch):
    """Fused attention on any device; what ran is listed."""
    calls = []

    def run(*arguments, exact_chunk, implementation):
        assert implementation == "cudnn"
        calls.append(arguments[2].shape[1])
        return fill_and_attend(*arguments, exact_chunk=exact_chunk, implementation="xla")

    def choose(*_, **__):
        return Choice("cudnn", "pretended")

    monkeypatch.setattr(attend, "fill_and_attend", run)
    monkeypatch.setattr(attend, "choose_prefill", choose)
    monkeypatch.setattr(generation, "choose_prefill", choose)
    # Traces made under another choice must not be found again, nor those of this test later.
    jax.clear_caches()
    yield calls
    jax.clear_caches()


def decoder(spec: CacheSpec) -> Decoder:
    config = small_config()
    return Decoder(
        config, random_parameters(config), spec, init_codec(config, spec, jax.random.key(2))
    )


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_reads_a_prompt_at_once_and_the_same(fused, monkeypatch, exact):
    model = decoder(SPECS["linear"])
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 50, length).tolist() for length in (90, 33)]
    whole, cache = generation.prefill(
        model, prompts, model.init_cache(batch=2, max_length=128), exact=exact
    )
    assert fused == [128]
    assert cache.lengths.tolist() == [90, 33]

    chunk = 128 if exact else 16
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(generation, "choose_prefill", lambda *_, **__: Choice("xla", "pretended"))
    expected, _ = generation.prefill(
        model, prompts, model.init_cache(batch=2, max_length=128), exact=exact
    )
    assert fused == [128]
    np.testing.assert_allclose(whole, expected, atol=0.1)
    assert np.median(np.abs(whole - expected)) < 1e-4


def test_a_prompt_of_too_many_tokens_goes_on_in_chunks(fused, monkeypatch):
    model = decoder(SPECS["linear"])
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 128)
    prompts = [list(range(50)) + list(range(45)), list(range(33))]
    logits, cache = generation.prefill(model, prompts, model.init_cache(batch=2, max_length=128))
    assert fused == [64]
    assert cache.lengths.tolist() == [95, 33]
    assert np.isfinite(logits).all()


def test_a_later_turn_is_not_fresh(fused):
    model = decoder(SPECS["linear"])
    prompts = [[1, 2, 3], [4, 5]]
    _, cache = generation.prefill(model, prompts, model.init_cache(batch=2, max_length=128))
    assert len(fused) == 1
    generation.prefill(model, prompts, cache)
    assert len(fused) == 1


def test_rows_that_hold_tokens_are_not_fresh():
    model = decoder(SPECS["linear"])
    tokens = jnp.ones((2, 2), jnp.int32)
    _, cache = model(
        tokens, jnp.asarray([[0, 1], [-1, -1]]), model.init_cache(batch=2, max_length=9)
    )
    positions = jnp.asarray([[2, 3], [0, 1]])
    with pytest.raises(ValueError, match="row 0 holds 2 tokens, so the cache is not fresh"):
        model(tokens, positions, cache, fresh=True)

    step = jax.jit(partial(Decoder.__call__, fresh=True))
    logits, after = step(model, tokens, positions, cache)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()
    assert after.lengths.tolist() == [2, 2]


@pytest.mark.parametrize("length", [1, 16, 17, 1000, 1024, 1025, 5000, 8192, 8193, 100_000])
def test_long_prompts_are_padded_little(length):
    width = generation.prefill_width(length)
    assert width >= length
    if length <= 1024:
        assert width == generation.bucket_size(length)
    else:
        assert width - length < generation.bucket_size(length) / 8
        assert width % 128 == 0
