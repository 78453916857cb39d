"""A whole sequence at once, a prompt in chunks and token by token: one definition of attention."""

from functools import cache as cached
from functools import partial

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import random_parameters, small_config

from h1bjax.cache import (
    PRESETS,
    CacheSpec,
    ChannelQuantisedKeys,
    GaussianSigns,
    KVCache,
    LinearCode,
    OrthogonalSigns,
    QuantisedValues,
    TwoPlanes,
    append_and_attend,
    dense_attention,
)
from h1bjax.cache.scoring import encode_keys
from h1bjax.decoder import Decoder, init_codec
from h1bjax.rope import rope_frequencies

pytestmark = pytest.mark.once

FOUR_BITS = QuantisedValues(4)
SINKS, WINDOW = 3, 7
SPECS = {
    spec.name: spec
    for spec in (
        *PRESETS.values(),
        CacheSpec("linear", LinearCode(2.0), FOUR_BITS, SINKS, WINDOW),
        CacheSpec("linear, period 128", LinearCode(2.0), FOUR_BITS, rope_period=128),
        CacheSpec("linear, period 64", LinearCode(2.0), FOUR_BITS, SINKS, WINDOW, "raw", 64),
        CacheSpec(
            "linear, period 32, fitted", LinearCode(2.0), FOUR_BITS, SINKS, WINDOW, "fitted", 32
        ),
        CacheSpec("signs, fitted", OrthogonalSigns(), FOUR_BITS, SINKS, WINDOW, "fitted"),
        CacheSpec("signs, period 32", OrthogonalSigns(), FOUR_BITS, SINKS, WINDOW, "corrected", 32),
        CacheSpec("64 bits", OrthogonalSigns(64), FOUR_BITS, SINKS, WINDOW, "corrected"),
        CacheSpec("256 bits", OrthogonalSigns(256), FOUR_BITS, SINKS, WINDOW, "corrected"),
        CacheSpec("paper, fitted", GaussianSigns(), FOUR_BITS, SINKS, WINDOW, "fitted"),
        CacheSpec("exact keys", None, FOUR_BITS, SINKS, WINDOW),
        CacheSpec("exact values", OrthogonalSigns(), None, SINKS, WINDOW, "corrected"),
        CacheSpec("no sinks", OrthogonalSigns(), QuantisedValues(3), window=9),
        CacheSpec("no window", TwoPlanes(), FOUR_BITS, scores="corrected"),
        CacheSpec("a window of one", OrthogonalSigns(), FOUR_BITS, sinks=1, window=1),
        # The preset's window is longer than these sequences.
        PRESETS["sinks-window"].replace(window=WINDOW),
        CacheSpec("quantised keys", ChannelQuantisedKeys(2), FOUR_BITS, SINKS, 32),
        CacheSpec("grouped values", OrthogonalSigns(), QuantisedValues(3, group=8), SINKS, WINDOW),
    )
}
RARE = {
    *("h1b-v2", "h1b-v3", "h1b-p32", "h1b-p32-v2", "h1b-256-v2", "h1b-unscaled-p32"),
    *("h1b-signs", "h1b-signs-v2", "h1b-signs-v3", "h1b-2plane", "h1b-unscaled", "kivi-4"),
    *("linear", "linear, period 128", "signs, fitted", "256 bits", "paper, fitted"),
    *("h1b-64-p32-v2", "linear, period 64", "signs, period 32", "64 bits", "no sinks"),
}
"""Combinations of what the other specs have one by one."""


def specs(*names: str):
    """Cases for `pytest.mark.parametrize`; those that are rare are slow."""
    slow = {name: [pytest.mark.slow] for name in RARE}
    return [pytest.param(SPECS[name], id=name, marks=slow.get(name, [])) for name in names]


every_spec = pytest.mark.parametrize("spec", specs(*SPECS))

LENGTHS = (100, 71)
TOKENS = max(LENGTHS)
LAYER = jnp.int32(1)


def config_for(spec: CacheSpec, kv_heads: int = 2):
    head_dim = 128 if spec.name in ("64 bits", "256 bits") else 32
    return small_config(head_dim=head_dim, num_heads=4, num_kv_heads=kv_heads)


def codec_for(spec: CacheSpec, kv_heads: int = 2):
    return None if spec.sketch is None else calibrated(spec.sketch, config_for(spec, kv_heads))


@cached
def calibrated(keys, config):
    """One layer's parameters, random also where they are neutral before calibration."""

    @jax.jit
    def init(rng):
        sizes = config.num_layers, config.num_kv_heads, config.num_heads, config.head_dim
        codec = keys.init(rng, *sizes)
        for parameter, centre, spread in (
            (codec.mean, 0.0, 0.5),
            (codec.temperature, 1.0, 0.1),
            (codec.offset, 0.0, 0.5),
        ):
            parameter[...] = centre + spread * jax.random.normal(rng, parameter.shape)
        return jax.tree.map(lambda array: array[1], codec)

    return init(jax.random.key(0))


@cached
def sequence(spec: CacheSpec, kv_heads: int = 2, dtype=jnp.float32):
    """Queries, keys, values and positions of a ragged batch."""
    config = config_for(spec, kv_heads)
    rng = np.random.default_rng(3)
    index = np.arange(TOKENS)
    positions = np.where(index < np.asarray(LENGTHS)[:, None], index, -1).astype(np.int32)

    def draw(heads):
        shape = (len(LENGTHS), TOKENS, heads, config.head_dim)
        return rng.normal(size=shape).astype(jnp.dtype(dtype))

    query, keys, values = draw(config.num_heads), draw(kv_heads), draw(kv_heads)
    while spec.sketch is not None:
        at_border = ~survives_rounding(spec, codec_for(spec, kv_heads), keys, positions)
        if not at_border.any():
            break
        keys[at_border] = draw(kv_heads)[at_border]
    return (query, keys, values), positions


@partial(jax.jit, static_argnums=0)
def sketch(spec, codec, keys, positions, frequencies):
    bits, scale = encode_keys(spec, spec.sketch, codec, keys, positions, frequencies)
    return bits, bits if scale is None else scale


def survives_rounding(spec, codec, keys, positions) -> np.ndarray:
    """Tokens that different orders of summation sketch alike.

    Where a coordinate is all but zero its sign depends on rounding, and where a scalar is all but
    halfway between two bfloat16 numbers its last bit does. Such keys may rightly differ.
    """
    amounts = 3e-6 * np.resize([1, -1], (8, 1, 1, 1, 1))
    noise = np.random.default_rng(5).normal(size=(8, *keys.shape))
    nearby = np.concatenate([keys[None], keys * (1 + amounts + amounts * noise)])
    batch = nearby.reshape(-1, *keys.shape[1:]).astype(np.float32)
    rows = np.tile(positions, (9, 1))
    same = True
    for codes in sketch(spec, codec, batch, rows, frequencies_for(spec)):
        stacked = np.asarray(codes).reshape(9, *positions.shape, -1)
        same &= (stacked == stacked[0]).all(axis=(0, 3))
    return np.asarray(same)


@cached
def empty(spec: CacheSpec, kv_heads: int, dtype) -> KVCache:
    sizes = {"batch": len(LENGTHS), "max_length": TOKENS}
    return KVCache.init(config_for(spec, kv_heads), spec, **sizes, dtype=dtype)


def frequencies_for(spec: CacheSpec):
    return jnp.asarray(rope_frequencies(config_for(spec)))


dense_step = jax.jit(dense_attention, static_argnums=0)
cached_step = jax.jit(append_and_attend, static_argnames="exact_chunk")


@cached
def dense(spec: CacheSpec, kv_heads: int = 2, dtype=jnp.float32) -> np.ndarray:
    tokens, positions = sequence(spec, kv_heads, dtype)
    codec, frequencies = codec_for(spec, kv_heads), frequencies_for(spec)
    return np.asarray(dense_step(spec, *tokens, positions, codec, frequencies))


def through_cache(
    spec: CacheSpec, chunks, width: int = TOKENS, kv_heads: int = 2, dtype=jnp.float32, **options
) -> np.ndarray:
    """The outputs of a sequence that is appended in chunks.

    Each of `chunks` says how many tokens every row takes; the rest of `width` is padding.
    """
    tokens, _ = sequence(spec, kv_heads, dtype)
    cache = empty(spec, kv_heads, dtype)
    codec, frequencies = codec_for(spec, kv_heads), frequencies_for(spec)
    outputs = np.zeros(tokens[0].shape, tokens[0].dtype)
    done, row = np.zeros(len(LENGTHS), int), np.arange(len(LENGTHS))[:, None]
    for wanted in chunks:
        count = np.minimum(wanted, np.asarray(LENGTHS) - done)
        index = np.arange(width)
        positions = np.where(index < count[:, None], done[:, None] + index, -1).astype(np.int32)
        cache.check(jnp.asarray(positions))
        chunk = (x[row, positions] for x in tokens)
        output, cache = cached_step(cache, LAYER, *chunk, positions, codec, frequencies, **options)
        cache = cache.advance(positions)
        valid, output = positions >= 0, np.asarray(output)
        assert not output[~valid].any()
        outputs[np.broadcast_to(row, valid.shape)[valid], positions[valid]] = output[valid]
        done += count
    assert cache.lengths.tolist() == list(LENGTHS)
    return outputs


def random_chunks(rng: np.random.Generator, width: int):
    """For every row its own split into chunks of up to `width` tokens."""
    done = np.zeros(len(LENGTHS), int)
    while (done < LENGTHS).any():
        chunk = rng.integers(0, width + 1, len(LENGTHS))
        yield chunk
        done = np.minimum(done + chunk, LENGTHS)


def plain_attention(tokens, positions) -> np.ndarray:
    """Causal attention in float64."""
    query, keys, values = (np.asarray(x, np.float64) for x in tokens)
    groups = query.shape[2] // keys.shape[2]
    keys, values = (np.repeat(x, groups, axis=2) for x in (keys, values))
    logits = np.einsum("bqhd,bkhd->bhqk", query, keys) / query.shape[-1] ** 0.5
    seen = (positions[:, None] >= 0) & (positions[:, None] <= positions[:, :, None])
    weights = np.where(seen[:, None], np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= np.where(total > 0, total, 1)
    return np.einsum("bhqk,bkhd->bqhd", weights, values)


def kivi_attention(tokens, length: int, *, bits: int, window: int, group: int = 32) -> np.ndarray:
    """Attention of one row as KIVI's paper describes it, in float64, token by token."""
    query, keys, values = (np.asarray(x[:length], np.float64) for x in tokens)
    recent_keys, recent_values = rounded(keys), rounded(values)
    # No query may see the keys of a group that is not complete.
    old_keys, old_values = np.full(keys.shape, np.nan), np.empty(values.shape)
    for start in range(0, length - group + 1, group):
        for head, channel in np.ndindex(keys.shape[1:]):
            column = slice(start, start + group), head, channel
            old_keys[column] = quantised(recent_keys[column], bits)
    for token, head, start in np.ndindex(length, keys.shape[1], keys.shape[2] // group):
        part = token, head, slice(start * group, (start + 1) * group)
        old_values[part] = quantised(values[part], bits)
    output = np.zeros(query.shape)
    for t, head in np.ndindex(query.shape[:2]):
        kv_head = head * keys.shape[1] // query.shape[1]
        old = max(t - window + 1, 0)
        seen = [
            np.concatenate([stored[:old, kv_head], recent[old : t + 1, kv_head]])
            for stored, recent in ((old_keys, recent_keys), (old_values, recent_values))
        ]
        logits = seen[0] @ query[t, head] / query.shape[-1] ** 0.5
        output[t, head], _ = float64.softmax_attention(logits, np.full(t + 1, True), seen[1])
    return output


def quantised(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers on an even grid from their minimum to their maximum."""
    zero, step = rounded(numbers.min()), rounded(np.ptp(numbers) / (2**bits - 1))
    return zero + step * np.clip(np.round((numbers - zero) / step), 0, 2**bits - 1)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """Float64 numbers that bfloat16 can hold."""
    return np.asarray(numbers, np.float32).astype(jnp.bfloat16).astype(np.float64)


def assert_agree(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=2e-5)


# One layer of attention, from the same queries, keys and values


@every_spec
def test_one_prefill_is_the_dense_form(spec):
    assert_agree(through_cache(spec, [LENGTHS]), dense(spec))


@every_spec
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**32 - 1), longest=st.sampled_from((12, 40, TOKENS)))
def test_any_split_of_a_ragged_batch_into_chunks_is_the_dense_form(spec, seed, longest):
    chunks = random_chunks(np.random.default_rng(seed), longest)
    assert_agree(through_cache(spec, chunks), dense(spec))


@pytest.mark.parametrize("spec", specs(*PRESETS, "linear, period 32, fitted", "exact values"))
def test_decoding_token_by_token_is_the_dense_form(spec):
    assert_agree(through_cache(spec, [1] * TOKENS, width=1), dense(spec))


@pytest.mark.parametrize(("name", "kv_heads"), [("h1b", 1), ("h1b", 4), ("exact", 1)])
def test_one_kv_head_and_as_many_as_query_heads_agree_too(name, kv_heads):
    spec, chunks = SPECS[name], [(60, 50), (30, 21), (10, 0)]
    assert_agree(through_cache(spec, chunks, kv_heads=kv_heads), dense(spec, kv_heads))


@pytest.mark.parametrize("name", ["h1b", "exact keys"])
def test_bfloat16_agrees_to_its_own_precision(name):
    spec = SPECS[name]
    expected = dense(spec, dtype=jnp.bfloat16)
    assert expected.dtype == jnp.bfloat16
    actual = through_cache(spec, [(60, 50), (40, 21)], dtype=jnp.bfloat16)
    actual, expected = (x.astype(np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("name", ["exact", "h1b"])
def test_the_dense_form_of_short_or_exact_sequences_is_plain_attention(name):
    spec = SPECS[name]
    tokens, positions = sequence(spec)
    expected = plain_attention(tokens, positions)
    inside = TOKENS if name == "exact" else spec.window
    # The window is kept in bfloat16.
    tolerance = 1e-5 if name == "exact" else 0.02
    np.testing.assert_allclose(dense(spec)[:, :inside], expected[:, :inside], atol=tolerance)


@pytest.mark.parametrize(
    "spec",
    specs(
        *("exact", "h1b-paper", "signs, fitted", "linear, period 32, fitted", "no window"),
        *("exact keys", "exact values", "kivi-2", "sinks-window"),
    ),
)
def test_an_exact_prefill_is_plain_attention_to_its_own_chunk(spec):
    chunks = [(60, 50), (40, 21)]
    tokens, positions = sequence(spec)
    expected = plain_attention(tokens, positions)
    assert_agree(through_cache(spec, [LENGTHS], exact_chunk=True), expected)

    output = through_cache(spec, chunks, exact_chunk=True)
    for row, first in enumerate(chunks[0]):
        assert_agree(output[row, :first], expected[row, :first])
        # The first token of the next chunk has just itself to read otherwise than in decoding.
        difference = np.abs(output[row, first] - dense(spec)[row, first]).max()
        if spec.name == "exact":
            assert difference < 2e-5
        else:
            assert difference < 2e-2 if spec.window else difference > 1e-4


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_is_what_its_paper_describes(bits):
    spec = SPECS[f"kivi-{bits}"]
    tokens, _ = sequence(spec)
    for row, length in enumerate(LENGTHS):
        expected = kivi_attention([x[row] for x in tokens], length, bits=bits, window=spec.window)
        np.testing.assert_allclose(dense(spec)[row, :length], expected, atol=2e-5)


@every_spec
def test_a_compressed_cache_is_near_exact_attention_and_not_equal_to_it(spec):
    tokens, positions = sequence(spec)
    error = np.abs(dense(spec) - plain_attention(tokens, positions)).mean()
    assert error < 1e-5 if spec.name == "exact" else 1e-3 < error < 0.5


# A whole decoder


@cached
def decoder(name: str) -> Decoder:
    config = small_config()
    codec = init_codec(config, SPECS[name], jax.random.key(2))
    return Decoder(config, random_parameters(config), SPECS[name], codec)


@jax.jit
def step(model, tokens, positions, cache):
    return model(tokens, positions, cache)


@partial(jax.jit, static_argnames="compressed")
def forward(model, tokens, positions, compressed):
    logits, cache = model(tokens, positions, compressed=compressed)
    assert cache is None
    return logits


@pytest.mark.parametrize(
    "name",
    ["exact", "h1b", pytest.param("linear, period 32, fitted", marks=pytest.mark.slow)],
)
def test_a_forward_pass_a_prefill_and_decoding_agree(name):
    model = decoder(name)
    tokens = np.random.default_rng(0).integers(0, 50, (2, TOKENS)).astype(np.int32)
    _, positions = sequence(SPECS[name])
    expected = forward(model, tokens, positions, compressed=True)

    prefill, cache = step(model, tokens, positions, model.init_cache(batch=2, max_length=TOKENS))
    assert cache.lengths.tolist() == list(LENGTHS)
    cache = model.init_cache(batch=2, max_length=TOKENS)
    decoded = np.zeros(expected.shape, np.float32)
    for n in range(TOKENS):
        logits, cache = step(model, tokens[:, n : n + 1], positions[:, n : n + 1], cache)
        decoded[:, n] = logits[:, 0]

    valid = positions >= 0
    for logits in (prefill, decoded):
        error = np.abs(np.asarray(logits) - expected)[valid].max(axis=-1)
        # Layers after the first see keys that differ in their last bits, so the sign of a
        # coordinate near zero can flip, which moves the logits of the tokens that read the key.
        assert np.median(error) < 1e-4
        assert error.max() < (1e-4 if name == "exact" else 0.1)


def test_a_compressed_forward_pass_is_exact_within_the_window_alone():
    model = decoder("h1b")
    tokens = np.random.default_rng(1).integers(0, 50, (2, TOKENS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (2, TOKENS))
    exact = forward(model, tokens, positions, compressed=False)
    difference = np.abs(np.asarray(forward(model, tokens, positions, compressed=True)) - exact)
    # Within the window they differ by bfloat16 alone.
    assert difference[:, :60].max() < 0.2
    assert difference[:, 64:].max() > 1e-3
