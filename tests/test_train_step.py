"""A step: the schedule, the optimizer, gradient accumulation, and that training learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_parameters, small_config

from train.initialise import random_parameters as initial_parameters
from train.step import (
    Recipe,
    initial_state,
    learning_rate,
    make_optimizer,
    train_step,
)
from train.student import narrowed

pytestmark = pytest.mark.once

CONFIG = small_config(tie_word_embeddings=True)


def recipe(**changes):
    return Recipe(
        **{
            "steps": 100,
            "learning_rate": 0.01,
            "warmup": 10,
            "weight_decay": 0.1,
            "dtype": "float32",
            **changes,
        }
    )


# The tests that take steps share it, so that its step is compiled once.
SHORT = recipe(steps=30, warmup=3)


def fresh():
    return initial_state(random_parameters(CONFIG), recipe())


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    rates = np.array([learning_rate(recipe(), step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 0.001 * np.arange(1, 11), rtol=1e-6)
    assert rates.argmax() == 9
    assert (np.diff(rates[9:]) < 0).all()
    np.testing.assert_allclose(rates[54], 0.01 * 0.55, rtol=1e-6)
    np.testing.assert_allclose(rates[-1], 0.001, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warmup_the_first_step_has_the_peak(warmup):
    assert learning_rate(recipe(warmup=warmup), 0) == pytest.approx(0.01, rel=1e-2)


def test_only_matrices_decay():
    config = small_config(qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True)
    masters = {name: jnp.ones_like(array) for name, array in random_parameters(config).items()}
    optimizer = make_optimizer(recipe(warmup=0))
    nothing = jax.tree.map(jnp.zeros_like, masters)
    updates, _ = jax.jit(optimizer.update)(nothing, optimizer.init(masters), masters)
    moved = {name for name, update in updates.items() if np.any(np.asarray(update))}
    assert moved == {
        *("embedding", "unembedding"),
        *("query", "key", "value", "output", "gate", "up", "down"),
    }


def test_a_huge_gradient_is_clipped():
    masters = {"query": jnp.zeros(4)}
    optimizer = make_optimizer(recipe(warmup=0))

    def moments(scale):
        gradient = {"query": scale * jnp.array([3.0, 4.0, 0.0, 0.0])}
        return jax.tree.leaves(optimizer.update(gradient, optimizer.init(masters), masters)[1])

    for one, other in zip(moments(1.0), moments(1e6), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_accumulating_microbatches_equals_one_large_batch():
    windows = jax.random.randint(jax.random.key(3), (8, 17), 0, CONFIG.vocab_size)
    whole, whole_metrics = train_step(fresh(), {}, windows, CONFIG, SHORT)
    parts = replace(SHORT, microbatches=4)
    state, metrics = train_step(fresh(), {}, windows, CONFIG, parts)
    assert metrics.losses.next_token == pytest.approx(
        float(whole_metrics.losses.next_token), rel=1e-5
    )
    assert metrics.gradient_norm == pytest.approx(float(whole_metrics.gradient_norm), rel=1e-4)
    # Adam divides by the size of each gradient, so small ones show rounding.
    for name, array in state.parameters.items():
        np.testing.assert_allclose(array, whole.parameters[name], atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_loss_falls(dtype):
    windows = jnp.asarray(np.arange(8 * 17).reshape(8, 17) % 13, jnp.int32)
    chosen = replace(SHORT, dtype=dtype)
    state = initial_state(initial_parameters(CONFIG, jax.random.key(0)), chosen)
    losses = []
    for _ in range(30):
        state, metrics = train_step(state, {}, windows, CONFIG, chosen)
        losses.append(float(metrics.losses.next_token))
    assert losses[0] == pytest.approx(np.log(CONFIG.vocab_size), rel=0.02)
    assert losses[-1] < 0.3 * losses[0]
    assert int(state.step) == 30
    assert {array.dtype for array in state.parameters.values()} == {jnp.dtype("float32")}


def test_only_what_is_summed_over_tokens_stays_wide():
    narrow = narrowed(random_parameters(CONFIG), "bfloat16")
    wide = {name for name, array in narrow.items() if array.dtype == jnp.float32}
    assert wide == {"embedding", "attention_norm", "mlp_norm", "final_norm"}


def test_initial_weights_have_the_documented_sizes():
    config = small_config(
        hidden_size=64, intermediate_size=96, num_layers=8, vocab_size=500, qkv_bias=True
    )
    parameters = jax.jit(initial_parameters, static_argnums=0)(config, jax.random.key(0))
    for name, array in parameters.items():
        if name.endswith("norm"):
            assert (np.asarray(array) == 1).all()
        elif name.endswith("bias"):
            assert (np.asarray(array) == 0).all()
        else:
            expected = 0.02 / 4 if name in ("output", "down") else 0.02
            assert np.std(array) == pytest.approx(expected, rel=0.03), name
            assert np.mean(array) == pytest.approx(0, abs=expected / 50), name


def test_initial_weights_are_those_of_the_key():
    one, same, other = (initial_parameters(CONFIG, jax.random.key(seed)) for seed in (0, 0, 1))
    for name in ("embedding", "query", "gate"):
        np.testing.assert_array_equal(one[name], same[name])
        assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one["gate"], one["up"])
