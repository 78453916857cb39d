"""The objective is the mean cross entropy of the next token, whatever the blocks and the dtype."""

from functools import cache as cached

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_parameters, small_config

import train.objective
from h1bjax.decoder import Decoder
from train.objective import losses
from train.student import narrowed

pytestmark = pytest.mark.once


@pytest.fixture
def config():
    return small_config(tie_word_embeddings=True)


def windows_of(config, batch=3, tokens=14):
    return jax.random.randint(jax.random.key(2), (batch, tokens), 0, config.vocab_size)


def plain_nats(parameters, config, windows):
    """By whole logits and indexing, with autodiff's own gradient."""
    positions = jnp.broadcast_to(jnp.arange(windows.shape[1] - 1), windows[:, 1:].shape)
    logits, _ = Decoder(config, parameters)(windows[:, :-1], positions)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], axis=-1)
    return -jnp.mean(chosen)


def our_nats(parameters, config, windows, dtype="float32", remat=False):
    decoder = Decoder(config, narrowed(parameters, dtype))
    return losses(decoder, windows, remat=remat).next_token


def with_gradient(nats, parameters, config, windows, **options):
    """The loss and its gradient, compiled at once, which is quicker than piece by piece."""
    compiled = jax.jit(
        jax.value_and_grad(lambda *given: nats(given[0], config, given[1], **options))
    )
    return compiled(parameters, windows)


@cached
def of_random_windows(nats, tied=True, **options):
    """The same for random parameters and windows, kept for the tests that share it."""
    config = small_config(tie_word_embeddings=tied)
    return with_gradient(nats, random_parameters(config), config, windows_of(config), **options)


def test_equals_the_cross_entropy_of_the_logits_in_float64(config):
    decoder, windows = Decoder(config, random_parameters(config)), windows_of(config)
    logits = np.asarray(decoder(windows[:, :-1], None)[0], np.float64)
    normaliser = np.log(np.sum(np.exp(logits), axis=-1))
    chosen = np.take_along_axis(logits, np.asarray(windows)[:, 1:, None], axis=-1)[..., 0]
    expected = np.mean(normaliser - chosen)
    np.testing.assert_allclose(losses(decoder, windows).next_token, expected, rtol=1e-6)


# Blocks of all 13 tokens of 3 rows, of 13 in 3 unequal parts, and of one token of each.
@pytest.mark.parametrize(
    ("logits", "tied"),
    [
        pytest.param(1 << 26, True, marks=pytest.mark.slow),
        (50 * 16, False),
        pytest.param(1, True, marks=pytest.mark.slow),
    ],
)
def test_blocks_change_neither_the_loss_nor_the_gradient(monkeypatch, logits, tied):
    expected = of_random_windows(plain_nats, tied)
    config = small_config(tie_word_embeddings=tied)
    monkeypatch.setattr(train.objective, "LOGITS", logits)
    found = with_gradient(our_nats, random_parameters(config), config, windows_of(config))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for name, gradient in found[1].items():
        np.testing.assert_allclose(gradient, expected[1][name], rtol=1e-3, atol=1e-6)


def test_logits_of_the_whole_batch_never_exist(monkeypatch, config):
    monkeypatch.setattr(train.objective, "LOGITS", 8 * config.vocab_size)
    parameters, windows = random_parameters(config), windows_of(config)
    traced = jax.make_jaxpr(jax.value_and_grad(our_nats), static_argnums=1)(
        parameters, config, windows
    )
    largest = max(
        int(np.prod(shape)) // config.vocab_size
        for shape in _shapes(traced.jaxpr)
        if config.vocab_size in shape
        # The parameters and their gradients.
        and config.hidden_size not in shape
    )
    # Two tokens of each of the three rows.
    assert largest == 6


@pytest.mark.slow
def test_remat_changes_no_gradient():
    kept = of_random_windows(our_nats)[1]
    again = of_random_windows(our_nats, remat=True)[1]
    for name, gradient in again.items():
        np.testing.assert_allclose(gradient, kept[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_bfloat16_arithmetic_gives_float32_gradients_of_the_same_direction():
    exact = of_random_windows(our_nats)[1]
    narrow = of_random_windows(our_nats, dtype="bfloat16")[1]
    for name, gradient in narrow.items():
        assert gradient.dtype == jnp.float32
        error = np.linalg.norm(gradient - exact[name]) / np.linalg.norm(exact[name])
        assert error < 0.05, name


@pytest.mark.slow
def test_bfloat16_does_not_round_away_the_gradient_of_a_frequent_token():
    config = small_config(tie_word_embeddings=False)
    parameters = random_parameters(config)
    windows = jnp.full((64, 65), 7, jnp.int32)
    exact = with_gradient(our_nats, parameters, config, windows)[1]["embedding"]
    narrow = with_gradient(our_nats, parameters, config, windows, dtype="bfloat16")[1]["embedding"]
    # Sums of 4096 terms kept in 16 bits stop growing after a few hundred.
    assert np.linalg.norm(narrow - exact) < 0.1 * np.linalg.norm(exact)


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)
