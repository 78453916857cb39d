"""What codecs are fitted by, against brute force, published tables and float64."""

from functools import partial
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from h1bjax.cache import GaussianSigns, LinearCode, OrthogonalSigns, TwoPlanes
from h1bjax.cache.fitting.rotation import iterative_quantisation
from h1bjax.cache.fitting.sample import KeySample
from h1bjax.cache.fitting.temperature import fit_temperature
from h1bjax.cache.fitting.transform_coding import allocate_bits, fit_linear_code

pytestmark = pytest.mark.once


seeds = st.integers(0, 2**32 - 1)


# Bit allocation


@settings(deadline=None, max_examples=40)
@given(seed=seeds, bits=st.integers(0, 12), flat=st.booleans())
def test_no_other_allocation_has_a_smaller_error(seed, bits, flat):
    deepest, components = 4, 3
    rng = np.random.default_rng(seed)
    gains = -np.sort(-rng.exponential(size=(deepest, components)), axis=0)
    gains *= 1.0 if flat else 10.0 ** rng.uniform(-4, 4, components)
    errors = np.vstack([gains[::-1].cumsum(axis=0)[::-1], np.zeros(components)])

    depth = np.asarray(jax.jit(allocate_bits)(jnp.asarray(errors, jnp.float32), bits))
    assert depth.sum() == bits
    assert ((depth >= 0) & (depth <= deepest)).all()
    channel = np.arange(components)
    best = min(
        errors[list(other), channel].sum()
        for other in product(range(deepest + 1), repeat=components)
        if sum(other) == bits
    )
    np.testing.assert_allclose(errors[depth, channel].sum(), best, rtol=1e-5)


# Transform codes

fit_code = jax.jit(fit_linear_code, static_argnames="bits")


def quantisers(projection, transform, levels, weight):
    """The quantisers of one head, one per component: encoder, decoded step and cells."""
    rows = [np.asarray(array, np.float64) for array in (projection, transform.T, levels, weight)]
    begins = [*np.flatnonzero(rows[3] == 1), len(rows[3])]
    found = []
    for begin, end in pairwise(begins):
        encoder, decoder, half, place = (array[begin:end] for array in rows)
        np.testing.assert_array_equal(place, 2.0 ** np.arange(end - begin))
        np.testing.assert_array_equal(half, 2.0 ** (end - begin - 1))
        np.testing.assert_allclose(encoder, np.tile(encoder[0], (end - begin, 1)))
        np.testing.assert_allclose(decoder, place[:, None] * decoder[0], rtol=1e-6)
        found.append((encoder[0], 2 * decoder[0], 2 ** int(end - begin)))
    return found


def quantise(fit, keys):
    """Centred keys after uniform quantisers with these cells, in float64."""
    decoded = np.zeros(keys.shape)
    for encoder, step, cells in quantisers(fit.projection, fit.transform, fit.levels, fit.weight):
        cell = np.clip(np.floor(keys @ encoder), -cells // 2, cells // 2 - 1)
        decoded += (cell + 0.5)[:, None] * step
    return decoded


def logit_error(error, moment) -> float:
    """`E[(q·e)²]` for independent queries."""
    return float(np.einsum("nd,de,ne->n", error, moment, error).mean())


def skewed(rng, samples, head_dim, power=1.0):
    """Samples whose principal components fall off by a power law, and their covariance."""
    basis = np.linalg.qr(rng.normal(size=(head_dim, head_dim)))[0]
    spread = (1.0 + np.arange(head_dim)) ** -power
    return (rng.normal(size=(samples, head_dim)) * spread) @ basis.T, (basis * spread**2) @ basis.T


def best_uniform(bits: int) -> float:
    """The least error of a uniform quantiser of a unit Gaussian, by numerical integration."""
    x = np.linspace(-9, 9, 50_001)
    density = stats.norm.pdf(x) * (x[1] - x[0])
    half = 2 ** (bits - 1)

    def error(step):
        cell = np.clip(np.floor(x / step), -half, half - 1) + 0.5
        return density @ (x - cell * step) ** 2

    return optimize.minimize_scalar(error, bounds=(3 / half, 6 / half**0.85), method="bounded").fun


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_component_is_quantised_as_well_as_a_gaussian_can_be(bits):
    samples = 8000
    keys = stats.norm.ppf((np.arange(samples) + 0.5) / samples)[:, None]
    fit = fit_code(jnp.asarray(keys, jnp.float32), jnp.eye(1), bits=bits)
    error = np.mean((keys - quantise(fit, keys)) ** 2)
    assert error < 1.02 * best_uniform(bits)
    # Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 6, 1960, table II.
    published = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}
    if bits in published:
        np.testing.assert_allclose(error, published[bits], rtol=0.01)


@pytest.mark.parametrize("rate", [pytest.param(0.5, marks=pytest.mark.slow), 1.0, 2.0])
def test_a_fitted_linear_code_is_a_bank_of_uniform_quantisers(rate):
    head_dim, kv_heads = 64, 2
    rng = np.random.default_rng(0)
    drawn = [skewed(rng, 800, head_dim) for _ in range(kv_heads)]
    keys = np.stack([samples + rng.normal(size=head_dim) for samples, _ in drawn])
    moment = np.stack([skewed(rng, 1, head_dim)[1] for _ in range(kv_heads)])
    codec = LinearCode(rate, scaled=False)
    parameters = fit_codec(codec, keys, moment)
    np.testing.assert_allclose(parameters.mean[...], keys.mean(axis=1), atol=1e-5)

    fresh = keys[:, :100] + 0.3 * rng.normal(size=(kv_heads, 100, head_dim))
    bits, scale = codec.encode(parameters, jnp.asarray(np.moveaxis(fresh, 0, 1), jnp.float32))
    assert scale is None
    signs = np.where(np.asarray(bits), 1.0, -1.0)
    transform = np.asarray(codec.query_transform(parameters), np.float64)
    decoded = np.einsum("nkc,kdc->nkd", signs, transform)
    for head in range(kv_heads):
        bank = quantisers(
            parameters.projection[head],
            parameters.transform[head],
            parameters.levels[head],
            parameters.weight[head],
        )
        assert sum(cells.bit_length() - 1 for _, _, cells in bank) == rate * head_dim
        encoders, steps = (np.stack(part) for part in list(zip(*bank, strict=True))[:2])
        # What one quantiser decodes, no other one sees.
        np.testing.assert_allclose(encoders @ steps.T, np.eye(len(bank)), atol=1e-3)
        centred = fresh[head] - np.asarray(parameters.mean[head], np.float64)
        coordinates = centred @ encoders.T
        cells = np.array([cells for *_, cells in bank])
        expected = (np.clip(np.floor(coordinates), -cells / 2, cells / 2 - 1) + 0.5) @ steps
        inner = (np.abs(coordinates - np.round(coordinates)) > 1e-4).all(axis=1)
        assert inner.mean() > 0.9
        np.testing.assert_allclose(decoded[inner, head], expected[inner], atol=1e-4)


def fit_codec(codec, keys, moment, heads=4, seed=0):
    sample = KeySample(jnp.asarray(keys, jnp.float32), jnp.asarray(moment, jnp.float32))
    return jax.jit(partial(codec.fit, heads=heads))(jax.random.key(seed), sample)


def decode(codec, parameters, keys) -> np.ndarray:
    """Keys as queries read them, in float64."""
    bits, scale = codec.encode(parameters, jnp.asarray(np.moveaxis(keys, 0, 1), jnp.float32))
    factor = 1.0 if scale is None else np.asarray(scale, np.float64)[..., None]
    transform = np.asarray(codec.query_transform(parameters), np.float64)
    read = factor * np.einsum("nkc,kdc->nkd", np.where(np.asarray(bits), 1.0, -1.0), transform)
    return np.moveaxis(read, 1, 0) + np.asarray(parameters.mean[...], np.float64)[:, None]


@pytest.mark.parametrize("rate", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_logits_err_less_for_knowing_keys_and_queries(rate):
    head_dim = 64
    rng = np.random.default_rng(1)
    samples, _ = skewed(rng, 1500, head_dim)
    keys = (samples + rng.normal(size=head_dim))[None]
    moment = skewed(rng, 1, head_dim)[1][None]
    codec = LinearCode(rate, scaled=False)
    start = jax.tree.map(lambda array: array[0], codec.init(jax.random.key(0), 1, 1, 4, head_dim))
    seen, unseen = keys[:, :1200], keys[:, 1200:]
    errors = [
        logit_error((unseen - decode(codec, parameters, unseen))[0], moment[0])
        for parameters in (
            fit_codec(codec, seen, moment),
            fit_codec(codec, seen, np.eye(head_dim)[None]),
            start,
        )
    ]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < 0.5 * errors[2]


def test_a_scaled_linear_code_is_exact_along_the_key_as_queries_measure_it():
    head_dim = 64
    rng = np.random.default_rng(2)
    keys = skewed(rng, 1000, head_dim, power=0.5)[0][None] + 1.0
    moment = skewed(rng, 1, head_dim, power=0.5)[1][None]
    codec = LinearCode(1.0)
    parameters = fit_codec(codec, keys, moment)
    mean = np.asarray(parameters.mean[...], np.float64)[:, None]
    read, true = decode(codec, parameters, keys) - mean, keys - mean
    # The metric of queries is their moment, of which no direction counts less than a thousandth.
    values, vectors = np.linalg.eigh(moment[0])
    metric = (vectors * np.maximum(values, 1e-3 * values[-1])) @ vectors.T
    along, length = (np.einsum("knd,de,kne->kn", x, metric, true) for x in (read, true))
    assert (along < 1.01 * length).all()
    # None is stretched more than threefold, which a few keys would need.
    np.testing.assert_allclose(np.median(along / length), 1.0, atol=1e-3)
    assert (np.abs(along / length - 1) < 0.01).mean() > 0.95


def test_bits_go_only_where_keys_vary():
    rng = np.random.default_rng(3)
    plane = np.linalg.qr(rng.normal(size=(8, 2)))[0]
    keys = rng.normal(size=(500, 2)) @ plane.T
    fit = fit_code(jnp.asarray(keys, jnp.float32), jnp.eye(8), bits=12)
    assert len(quantisers(*fit[:4])) == 2
    transform = np.asarray(fit.transform, np.float64)
    np.testing.assert_allclose(transform - plane @ (plane.T @ transform), 0.0, atol=1e-4)
    assert np.mean((keys - quantise(fit, keys)) ** 2) < 2e-3 * np.mean(keys**2)


def test_bits_go_where_queries_look():
    rng = np.random.default_rng(4)
    keys = rng.normal(size=(2000, 8))
    looked_at = np.linalg.qr(rng.normal(size=(8, 1)))[0]
    fit = fit_code(jnp.asarray(keys, jnp.float32), jnp.asarray(looked_at @ looked_at.T), bits=8)
    steps = {cells: step / np.linalg.norm(step) for _, step, cells in quantisers(*fit[:4])}
    assert max(steps) >= 2**6
    np.testing.assert_allclose(np.abs(steps[max(steps)] @ looked_at), 1.0, atol=0.01)
    error = (keys - quantise(fit, keys)) @ looked_at
    assert np.mean(error**2) < 2e-3


CODECS = [OrthogonalSigns(), TwoPlanes(), GaussianSigns(64), LinearCode(1.0), LinearCode(8.0)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_keys_that_hardly_vary_are_fitted_without_a_nan(codec, rank):
    rng = np.random.default_rng(5)
    varying = rng.normal(size=(2, 100, rank)) @ rng.normal(size=(2, rank, 32))
    keys = 3.0 + np.concatenate([varying, np.zeros((2, 5, 32))], axis=1)
    parameters = fit_codec(codec, keys, np.zeros((2, 32, 32)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters))
    assert np.isfinite(decode(codec, parameters, keys + rng.normal(size=keys.shape))).all()


# Rotations


def signs(u):
    return jnp.where(u >= 0, 1.0, -1.0)


def two_planes(u):
    typical = jnp.sqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True))
    return signs(u) * jnp.where(jnp.abs(u) > 0.98 * typical, 3.0, 1.0)


rotate = jax.jit(iterative_quantisation, static_argnames=("components", "code"))


@pytest.mark.parametrize("code", [signs, two_planes])
@pytest.mark.parametrize("components", [16, 24, 8])
def test_a_fitted_rotation_is_orthonormal_and_nearer_to_its_codes_than_chance(components, code):
    head_dim = 16
    rng = np.random.default_rng(6)
    vectors = skewed(rng, 2000, head_dim, power=0.7)[0]
    fitted = rotate(jax.random.key(0), jnp.asarray(vectors, jnp.float32), components, code)
    fitted = np.asarray(fitted, np.float64)
    assert fitted.shape == (components, head_dim)
    narrow = fitted.T @ fitted if components >= head_dim else fitted @ fitted.T
    np.testing.assert_allclose(narrow, np.eye(min(components, head_dim)), atol=1e-5)

    def closeness(rotation):
        u = vectors @ rotation.T
        return np.mean(np.sum(u * np.asarray(code(u)), axis=-1))

    for _ in range(20):
        tall = np.linalg.qr(rng.normal(size=(max(fitted.shape), min(fitted.shape))))[0]
        assert closeness(fitted) > closeness(tall if components >= head_dim else tall.T)


def test_fewer_components_are_the_principal_ones():
    rng = np.random.default_rng(7)
    vectors, covariance = skewed(rng, 5000, 12)
    fitted = np.asarray(rotate(jax.random.key(0), jnp.asarray(vectors, jnp.float32), 3, signs))
    energy = np.trace(fitted @ covariance @ fitted.T)
    np.testing.assert_allclose(energy, np.linalg.eigvalsh(covariance)[-3:].sum(), rtol=0.01)


def test_a_hidden_rotation_of_sign_vectors_is_found_from_some_starts():
    rng = np.random.default_rng(8)
    corners = np.where(rng.normal(size=(500, 6)) >= 0, 1.0, -1.0)
    hidden = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    vectors = jnp.asarray(corners @ hidden, jnp.float32)
    fits = [rotate(jax.random.key(seed), vectors, 6, signs) for seed in range(12)]
    found = [np.abs(np.abs(vectors @ fit.T) - 1).max() < 1e-3 for fit in fits]
    # The fit is local; other rotations of a cube are stable too, but not that near.
    assert sum(found) >= 3


# Temperature and offset

WINDOWS, HEADS, QUERIES, KEYS = 2, 3, 8, 20
fit_scores = jax.jit(fit_temperature)


def some_logits(seed, size=2.0):
    """Exact logits, sketches of them, and which keys are seen at all and from their sketch."""
    rng = np.random.default_rng(seed)
    shape = (WINDOWS, HEADS, QUERIES, KEYS)
    exact = size * rng.normal(size=shape)
    slope = rng.uniform(0.5, 2.0, (HEADS, 1, 1))
    sketched = slope * exact + rng.uniform(-2, 2, (HEADS, 1, 1))
    sketched += rng.uniform(0, 1) * size * rng.normal(size=shape)
    t, n = np.arange(KEYS - QUERIES, KEYS)[:, None], np.arange(KEYS)
    return exact, sketched, n <= t, (n >= 2) & (n <= t - 3)


def divergence(theta, exact, sketched, causal, stored) -> float:
    """Mean `KL(exact ‖ sketched)` of one head, with the prior that the fit documents as weak."""

    def log_softmax(logits):
        seen = np.where(causal, logits, -np.inf)
        seen = seen - seen.max(axis=-1, keepdims=True)
        return seen - np.log(np.exp(seen).sum(axis=-1, keepdims=True))

    wanted = log_softmax(exact)
    got = log_softmax(np.where(stored, theta[0] * sketched + theta[1], exact))
    with np.errstate(invalid="ignore"):
        terms = np.where(causal, np.exp(wanted) * (wanted - got), 0.0)
    return terms.sum(axis=-1).mean() + 0.5e-3 * ((theta[0] - 1) ** 2 + theta[1] ** 2)


@settings(deadline=None, max_examples=10)
@given(seed=seeds, size=st.sampled_from([0.3, 2.0, 6.0]))
def test_temperature_and_offset_minimise_the_divergence(seed, size):
    exact, sketched, causal, stored = some_logits(seed, size)
    fitted = np.stack(fit_scores(exact, sketched, causal, stored), axis=-1)
    for head in range(HEADS):
        cost = partial(
            divergence,
            exact=exact[:, head],
            sketched=sketched[:, head],
            causal=causal,
            stored=stored,
        )
        best = optimize.minimize(
            cost, [1.0, 0.0], method="L-BFGS-B", bounds=[(0.05, None), (None, None)]
        )
        assert cost(fitted[head]) <= best.fun + 1e-5
        assert cost(fitted[head]) <= cost([1.0, 0.0]) + 1e-6


def test_known_repairs_are_found():
    exact, _, causal, stored = some_logits(0)
    slope, shift = np.array([0.5, 1.0, 2.0]), np.array([1.0, 0.0, -1.5])
    sketched = (exact - shift[:, None, None]) / slope[:, None, None]
    temperature, offset = fit_scores(exact, sketched, causal, stored)
    np.testing.assert_allclose(temperature, slope, atol=0.02)
    np.testing.assert_allclose(offset, shift, atol=0.05)


def test_what_the_sample_does_not_say_stays_neutral():
    exact, sketched, causal, stored = some_logits(1)
    temperature, offset = fit_scores(exact, sketched, causal, np.zeros_like(stored))
    np.testing.assert_array_equal(temperature, 1.0)
    np.testing.assert_array_equal(offset, 0.0)
    # An offset of every key changes nothing, so that only the temperature can be known.
    temperature, offset = fit_scores(exact, 0.5 * exact, causal, causal)
    np.testing.assert_allclose(temperature, 2.0, atol=0.01)
    np.testing.assert_allclose(offset, 0.0, atol=0.01)


@pytest.mark.parametrize("size", [1e-6, 100.0, 1e4])
@pytest.mark.parametrize("kind", ["near", "unrelated", "opposite"])
def test_any_logits_give_finite_scores_and_no_negative_temperature(size, kind):
    exact, sketched, causal, stored = some_logits(2, size)
    other = {"near": sketched, "unrelated": some_logits(3, size)[0], "opposite": -exact}[kind]
    temperature, offset = fit_scores(exact, other, causal, stored)
    assert np.isfinite(temperature).all()
    assert np.isfinite(offset).all()
    assert (np.asarray(temperature) >= 0.05).all()
