import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from h1bjax.sampling import Sampling, filter_logits, row_keys, sample

pytestmark = pytest.mark.once

apply_filters = jax.jit(filter_logits)
keys_for = jax.jit(row_keys, static_argnums=1)


def support(logits, sampling: Sampling) -> np.ndarray:
    return np.isfinite(apply_filters(logits, sampling))


SETTINGS = {
    "temperature": st.sampled_from([0.3, 1.0, 2.5]),
    "top_k": st.sampled_from([0, 1, 5, 40, 1000]),
    "top_p": st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5]),
}
VOCAB = 40


def random_logits(seed: int, batch: int = 4, vocab: int = VOCAB) -> np.ndarray:
    return 3 * np.random.default_rng(seed).standard_normal((batch, vocab)).astype(np.float32)


def oracle_filter(logits, temperature, top_k, top_p, min_p) -> tuple[np.ndarray, bool]:
    """The definition, token by token, in float64.

    Returns the tokens kept, and whether rounding may decide otherwise at a border.
    """
    kept = np.ones(logits.shape, bool)
    distances = []
    for row, keep in zip(logits.astype(np.float64) / temperature, kept, strict=True):
        order = np.argsort(row, kind="stable")[::-1]
        if top_k:
            keep &= row >= row[order[min(top_k, len(row)) - 1]]
        weights = np.where(keep, np.exp(row - row.max()), 0)
        probabilities = weights / weights.sum()
        # What the more probable tokens have already.
        before = np.cumsum(probabilities[order]) - probabilities[order]
        if top_p < 1:
            keep[order] &= before < top_p
            distances += [np.abs(before - top_p).min()]
        if min_p:
            ratios = probabilities / probabilities.max()
            keep &= ratios >= min_p
            distances += [np.abs(ratios - min_p).min()]
    return kept, min(distances, default=1.0) < 1e-5


# Filters


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32 - 1), values=st.fixed_dictionaries(SETTINGS))
def test_filters_keep_the_tokens_that_the_definition_keeps(seed, values):
    logits = random_logits(seed)
    expected, unsure = oracle_filter(logits, **values)
    assume(not unsure)
    np.testing.assert_array_equal(support(logits, Sampling.create(**values)), expected)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), values=st.fixed_dictionaries(SETTINGS))
def test_filters_keep_the_tokens_that_transformers_keeps(seed, values):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(seed)
    assume(not oracle_filter(logits, **values)[1])
    steps = [process.TemperatureLogitsWarper(values["temperature"])]
    if values["top_k"]:
        steps.append(process.TopKLogitsWarper(values["top_k"]))
    steps.append(process.TopPLogitsWarper(values["top_p"]))
    steps.append(process.MinPLogitsWarper(values["min_p"]))
    scores = torch.tensor(logits)
    for step in steps:
        scores = step(None, scores)
    ours = apply_filters(logits, Sampling.create(**values))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(scores.numpy()))
    expected = jax.nn.softmax(jnp.asarray(scores.numpy()))
    np.testing.assert_allclose(jax.nn.softmax(ours), expected, atol=1e-6)


def test_ties_at_the_border_of_top_p_are_cut_to_the_fewest_tokens():
    flat = jnp.zeros((1, 10))
    kept = support(flat, Sampling.create(temperature=1.0, top_p=0.45))
    assert np.flatnonzero(kept[0]).tolist() == [5, 6, 7, 8, 9]


def test_ties_at_the_border_of_top_k_all_stay():
    logits = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = support(logits, Sampling.create(temperature=1.0, top_k=2))
    assert kept[0].tolist() == [True, False, True, True, False]


def test_tokens_that_are_ruled_out_stay_out():
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0, -jnp.inf]])
    for values in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.01}):
        kept = support(logits, Sampling.create(temperature=1.0, **values))
        assert kept[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("values", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 0.999}])
def test_the_strictest_filters_are_greedy(values):
    logits = random_logits(1, batch=16)
    tokens = sample(logits, Sampling.create(temperature=1.0, **values), keys_of(16))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


# Choice


def keys_of(batch: int, step: int = 0, seed: int = 0) -> jax.Array:
    return keys_for(jax.random.key(seed), batch, step)


def test_zero_temperature_is_greedy():
    logits = random_logits(2)
    tokens = sample(logits, Sampling.create(), keys_of(4))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    # Of equal logits the first wins, as in transformers.
    assert sample(jnp.zeros((1, 5)), Sampling.create(), keys_of(1)).tolist() == [0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits = 100 * random_logits(3)
    tokens = sample(logits, Sampling.create(temperature=temperature), keys_of(4))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_logits_of_half_precision_are_sampled_in_float32():
    logits = jnp.asarray(random_logits(4), jnp.bfloat16)
    sampling = Sampling.create(temperature=0.7, top_p=0.9)
    expected = sample(logits.astype(jnp.float32), sampling, keys_of(4))
    np.testing.assert_array_equal(sample(logits, sampling, keys_of(4)), expected)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_frequencies_follow_the_softmax(values):
    stats = pytest.importorskip("scipy.stats")
    logits, draws = random_logits(5, batch=1, vocab=12) / 2, 20_000
    sampling = Sampling.create(**values)
    tokens = sample(jnp.tile(logits, (draws, 1)), sampling, keys_of(draws))
    counts = np.bincount(np.asarray(tokens), minlength=12)
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | values
    kept = oracle_filter(logits, **full)[0][0]
    weights = np.where(kept, np.exp(logits[0].astype(np.float64) / values["temperature"]), 0)
    assert not counts[~kept].any()
    expected = draws * weights[kept] / weights.sum()
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("values", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}])
def test_rows_without_a_usable_maximum_give_minus_one(temperature, values):
    logits = random_logits(6)
    logits[0, 7] = np.nan
    logits[1] = -np.inf
    logits[2, 3] = np.inf
    sampling = Sampling.create(temperature=temperature, **values)
    tokens = np.asarray(sample(logits, sampling, keys_of(4)))
    assert tokens[:3].tolist() == [-1, -1, -1]
    logits[:3] = 0
    assert tokens[3] == sample(logits, sampling, keys_of(4))[3] >= 0


# Keys


@pytest.mark.parametrize(("batch", "step"), [(1, 0), (3, 0), (3, 17)])
def test_a_row_does_not_depend_on_its_neighbours(batch, step):
    sampling = Sampling.create(temperature=1.0, top_p=0.9)
    logits = random_logits(7, batch=8)
    everyone = sample(logits, sampling, keys_of(8, step))
    logits[batch:] = 0
    some = sample(logits[:batch], sampling, keys_of(batch, step))
    np.testing.assert_array_equal(some, everyone[:batch])


def test_rows_steps_and_seeds_have_different_keys():
    keys = [keys_of(4, step, seed) for step in (0, 1) for seed in (0, 1)]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == 16


def test_the_step_may_be_traced():
    np.testing.assert_array_equal(
        jax.random.key_data(keys_of(2, 5)),
        jax.random.key_data(keys_for(jax.random.key(0), 2, jnp.asarray(5))),
    )


# Settings


def test_changing_values_does_not_recompile():
    traces = []

    @jax.jit
    def choose(logits, sampling, keys):
        traces.append(sampling)
        return sample(logits, sampling, keys)

    for values in ({}, {"temperature": 0.5}, {"temperature": 1, "top_k": 3}, {"top_p": 0.5}):
        choose(random_logits(8), Sampling.create(**values), keys_of(4))
    assert len(traces) == 1


def test_nothing_is_sorted_unless_top_k_or_top_p_asks_for_it():
    lowered = jax.make_jaxpr(sample)(random_logits(9), Sampling.create(), keys_of(4))

    def primitives(jaxpr, inside_conditions):
        for equation in jaxpr.eqns:
            yield equation.primitive.name, inside_conditions
            for inner in jaxprs_in_params(equation.params):
                nested = equation.primitive.name == "cond"
                yield from primitives(inner, inside_conditions + nested)

    sorts = [depth for name, depth in primitives(lowered.jaxpr, 0) if name == "sort"]
    assert sorts == [2]


def test_all_fields_are_scalars_of_fixed_dtype():
    for sampling in (Sampling.create(), Sampling.create(0.5, 3, 0.5, 0.5)):
        leaves = dataclasses.asdict(sampling)
        assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves.items()} == {
            "temperature": ((), "float32"),
            "top_k": ((), "int32"),
            "top_p": ((), "float32"),
            "min_p": ((), "float32"),
        }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), 1e39]),
        ("top_k", [-1, 1.0, 2.5, True, float("nan"), 2**31]),
        ("top_p", [0.0, -0.5, 1.1, float("nan")]),
        ("min_p", [-0.1, 1.0, float("nan")]),
    ],
)
def test_values_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be .*not {re.escape(repr(value))}$"):
            Sampling.create(**{name: value})


def test_all_wrong_values_are_named_together():
    with pytest.raises(ValueError, match=r"temperature.*; top_k.*; top_p.*; min_p"):
        Sampling.create(temperature=-1, top_k=-1, top_p=2, min_p=1)
