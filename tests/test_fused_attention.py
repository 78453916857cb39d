"""Attention over whole rows is exact attention, and so is the decoder that uses it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_parameters, small_config

from h1bjax.cache import CacheSpec, dense_attention
from h1bjax.decoder import Decoder, init_codec
from h1bjax.fused_attention import causal_attention, choose_implementation

pytestmark = pytest.mark.once

EXACT = CacheSpec.preset("exact")


def full_rows(batch, tokens):
    return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_equals_dense_exact_attention_and_its_gradient(kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, 19, 4, 16))
    key, value = (jax.random.normal(k, (2, 19, kv_heads, 16)) for k in keys[1:3])
    direction = jax.random.normal(keys[3], query.shape)

    def fused(query, key, value):
        return jnp.sum(direction * causal_attention(query, key, value))

    def dense(query, key, value):
        attended = dense_attention(EXACT, query, key, value, full_rows(2, 19), None, jnp.ones(8))
        return jnp.sum(direction * attended)

    found = jax.jit(jax.value_and_grad(fused, (0, 1, 2)))(query, key, value)
    expected = jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(query, key, value)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_keeps_16_bit_inputs_16_bit():
    query = jnp.ones((1, 3, 2, 8), jnp.bfloat16)
    assert causal_attention(query, query, query).dtype == jnp.bfloat16


def test_says_why_there_is_no_cudnn_on_a_cpu():
    choice = choose_implementation("bfloat16", 128)
    assert choice.implementation == "xla"
    assert "no NVIDIA GPU" in choice.reason


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected", "reason"),
    [
        ("9.0", "bfloat16", 256, "cudnn", "16-bit"),
        ("10.3", "float16", 256, "cudnn", "16-bit"),
        ("8.0", "bfloat16", 128, "cudnn", "16-bit"),
        ("8.0", "bfloat16", 256, "xla", "up to 128 .* not 256"),
        ("7.5", "float16", 64, "xla", "capability 8.0, not 7.5"),
        ("9.0", "bfloat16", 12, "xla", "multiples of 8"),
        ("9.0", "float32", 128, "xla", "not float32"),
        ("gfx90a", "bfloat16", 128, "xla", "no NVIDIA GPU"),
    ],
)
def test_chooses_cudnn_where_it_can(monkeypatch, capability, dtype, head_dim, expected, reason):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    choice = choose_implementation(dtype, head_dim)
    assert choice.implementation == expected
    assert re.search(reason, choice.reason)


def test_a_decoder_without_positions_reads_full_rows():
    config = small_config()
    decoder = Decoder(config, random_parameters(config))
    tokens = jax.random.randint(jax.random.key(1), (3, 21), 0, config.vocab_size)
    expected, _ = decoder(tokens, full_rows(3, 21))
    found, cache = decoder(tokens, None)
    assert cache is None
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_token_outside_of_the_vocabulary_gives_nan_without_positions_too():
    config = small_config()
    tokens = jnp.array([[1, 50, 2], [1, 49, 2]])
    logits, _ = Decoder(config, random_parameters(config))(tokens, None)
    assert np.isnan(logits[0, 1:]).all()
    assert np.isfinite(logits[1]).all()


def test_positions_are_needed_with_a_cache():
    config, spec = small_config(), CacheSpec.preset("h1b")
    codec = init_codec(config, spec, jax.random.key(0))
    decoder = Decoder(config, random_parameters(config), spec, codec)
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="needs positions"):
        decoder(tokens, None, decoder.init_cache(batch=1, max_length=128))


def test_rows_beyond_the_sliding_window_are_refused_without_positions_too():
    config = small_config(model_type="mistral", sliding_window=8)
    decoder = Decoder(config, random_parameters(config))
    with pytest.raises(ValueError, match="sliding window of 8"):
        decoder(jnp.zeros((1, 9), jnp.int32), None)


def test_wide_embeddings_and_norms_do_not_widen_the_arithmetic():
    config = small_config(tie_word_embeddings=True)
    parameters = random_parameters(config)
    narrow = {name: array.astype(jnp.bfloat16) for name, array in parameters.items()}
    wide = {
        name: parameters[name] if name == "embedding" or name.endswith("norm") else array
        for name, array in narrow.items()
    }
    decoder = Decoder(config, wide)
    assert decoder.dtype == jnp.bfloat16
    hidden, _ = decoder.hidden(jnp.zeros((1, 4), jnp.int32), None)
    assert hidden.dtype == jnp.bfloat16
    assert decoder.logits(hidden).dtype == jnp.float32
