"""What trains and what stays: the model that is put together, and one step of each kind."""

from functools import cache as cached

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_parameters, small_config

from h1bjax.cache import CacheSpec, GaussianSigns, LinearCode, OrthogonalSigns, QuantisedValues
from h1bjax.decoder import Decoder
from h1bjax.model import random_projections
from train.objective import losses
from train.step import Recipe, initial_state, nearly_orthogonal, train_step
from train.student import (
    Origin,
    Scope,
    fixed_arrays,
    merged_weights,
    student,
    teacher,
    trained_arrays,
)

pytestmark = pytest.mark.once

CONFIG = small_config(tie_word_embeddings=True)
VALUES = QuantisedValues(2, rotated=True)
SIGNS = CacheSpec("signs", OrthogonalSigns(), VALUES, 2, 6, scores="fitted")
LINEAR = CacheSpec("linear", LinearCode(), QuantisedValues(4), 2, 6)
PAPER = CacheSpec("paper", GaussianSigns(), QuantisedValues(4), scores="fitted")
WINDOWS = jnp.asarray(np.random.default_rng(1).integers(0, 50, (4, 25)), jnp.int32)


def origin_of(spec):
    codec, rotation = random_projections(CONFIG, spec, seed=0)
    return Origin(random_parameters(CONFIG), codec, rotation)


def recipe_of(scope, **changes):
    options = {"steps": 8, "learning_rate": 3e-4, "warmup": 1, "weight_decay": 0.1, **changes}
    return Recipe(**options, dtype="float32", scope=scope, next_token=0.0, distillation=1.0)


def begin(scope):
    origin = origin_of(scope.spec)
    trained = trained_arrays(CONFIG, scope, origin, jax.random.key(0))
    return trained, fixed_arrays(scope, origin, "float32", taught_by=origin.weights)


def host(arrays):
    return {name: np.array(array) for name, array in arrays.items()}


@cached
def after_steps(scope):
    """What trained before and after some steps, and the divergence at each."""
    trained, fixed = begin(scope)
    before, recipe = host(trained), recipe_of(scope)
    state, divergences = initial_state(trained, recipe), []
    for _ in range(recipe.steps):
        state, metrics = train_step(state, fixed, WINDOWS, CONFIG, recipe)
        divergences.append(float(metrics.losses.divergence))
    return before, host(state.parameters), divergences


WEIGHTS = {"embedding", "final_norm", "attention_norm", "mlp_norm"} | {
    *("query", "key", "value", "output", "gate", "up", "down")
}
SCORES = {"codec/temperature", "codec/offset"}
CHANGES = {
    f"lora/{name}/{end}"
    for name in ("query", "key", "value", "output", "gate", "up", "down")
    for end in ("in", "out")
}


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        (Scope(), WEIGHTS),
        (Scope(SIGNS, "temperatures"), SCORES),
        (Scope(SIGNS, "decoders"), SCORES | {"codec/projection", "codec/mean"}),
        (Scope(PAPER, "decoders"), SCORES | {"codec/projection"}),
        (Scope(LINEAR, "decoders"), {"codec/transform", "codec/mean"}),
        (Scope(LINEAR, "lora", 3), CHANGES | {"codec/transform", "codec/mean"}),
        (Scope(LINEAR), WEIGHTS | {"codec/transform", "codec/mean"}),
    ],
    ids=lambda value: f"{value.spec.name} {value.trained}" if isinstance(value, Scope) else "",
)
def test_what_trains_and_what_stays_is_the_whole_model(scope, names):
    trained, fixed = begin(scope)
    assert trained.keys() == names
    built = student(CONFIG, scope, trained, fixed, "float32")
    origin = origin_of(scope.spec)
    untrained = Decoder(CONFIG, origin.weights)
    tokens = WINDOWS[:, :-1]
    np.testing.assert_allclose(built(tokens, None)[0], untrained(tokens, None)[0], atol=2e-4)
    if origin.codec is not None:
        for one, other in zip(
            jax.tree.leaves(built.codec), jax.tree.leaves(origin.codec), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_a_change_of_low_rank_is_added_to_its_matrix():
    scope = Scope(rank=2, trained="lora")
    trained, fixed = begin(scope)
    rng = np.random.default_rng(0)
    trained = {name: rng.normal(size=array.shape) for name, array in trained.items()}
    merged = merged_weights(CONFIG, scope, jax.tree.map(jnp.asarray, trained), fixed)
    for name, pattern in {
        "query": "er,rhd->ehd",
        "output": "hdr,re->hde",
        "down": "fr,re->fe",
    }.items():
        for layer in range(CONFIG.num_layers):
            first, second = (trained[f"lora/{name}/{end}"][layer] for end in ("in", "out"))
            change = np.einsum(pattern, first, second)
            np.testing.assert_allclose(
                merged[name][layer], fixed[name][layer] + change, rtol=1e-4, atol=1e-5
            )
    np.testing.assert_array_equal(merged["embedding"], fixed["embedding"])


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(Scope(SIGNS, "temperatures"), marks=pytest.mark.slow),
        Scope(SIGNS, "decoders"),
        pytest.param(Scope(LINEAR, "lora", 3), marks=pytest.mark.slow),
        pytest.param(Scope(LINEAR, "everything"), marks=pytest.mark.slow),
    ],
    ids=lambda scope: scope.trained,
)
def test_training_moves_all_that_trains_towards_the_teacher(scope):
    before, after, divergences = after_steps(scope)
    assert all(np.any(before[name] != after[name]) for name in before)
    assert divergences[0] > 0
    assert divergences[-1] < divergences[0]


def test_rotations_stay_rotations():
    _, after, _ = after_steps(Scope(SIGNS, "decoders"))
    rotation = after["codec/projection"]
    gram = np.einsum("lkcd,lkce->lkde", rotation, rotation)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(32), gram.shape), atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_a_matrix_near_a_rotation_is_brought_back_to_it(shape):
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    near = u * (1 + 0.01 * rng.normal(size=3)) @ v
    found = nearly_orthogonal(jnp.asarray(near, jnp.float32))
    assert np.abs(found - u @ v).max() < 3e-4 < np.abs(near - u @ v).max()


def test_the_divergence_is_that_of_the_teacher_from_the_student():
    one, other = (Decoder(CONFIG, random_parameters(CONFIG, seed)) for seed in (0, 1))
    found = losses(one, WINDOWS, teacher=other)
    known, guessed = (
        np.asarray(jax.nn.log_softmax(decoder(WINDOWS[:, :-1], None)[0]), np.float64)
        for decoder in (other, one)
    )
    expected = np.mean(np.sum(np.exp(known) * (known - guessed), axis=-1))
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-4)
    np.testing.assert_allclose(found.next_token, losses(one, WINDOWS).next_token, rtol=1e-6)
    assert losses(one, WINDOWS, teacher=one).divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scope", [Scope(LINEAR), Scope(LINEAR, "lora", 2)], ids=str)
def test_the_teacher_is_the_model_before_training_or_another(scope):
    origin, other = origin_of(LINEAR), random_parameters(CONFIG, 1)
    for weights in (origin.weights, other):
        fixed = fixed_arrays(scope, origin, "float32", taught_by=weights)
        for name, array in teacher(CONFIG, fixed).parameters().items():
            np.testing.assert_array_equal(array, weights[name], err_msg=name)
        trained = trained_arrays(CONFIG, scope, origin, jax.random.key(0))
        begun = merged_weights(CONFIG, scope, trained, fixed)
        np.testing.assert_array_equal(begun["gate"], origin.weights["gate"])


def test_the_teacher_gets_no_gradient():
    def divergence(weights):
        decoder = Decoder(CONFIG, weights)
        return losses(
            Decoder(CONFIG, random_parameters(CONFIG)), WINDOWS, teacher=decoder
        ).divergence

    gradient = jax.jit(jax.grad(divergence))(random_parameters(CONFIG, 1))
    assert not any(np.any(array) for array in gradient.values())


@pytest.mark.parametrize(
    ("spec", "trained", "rank", "message"),
    [
        (LINEAR, "temperatures", None, "its scores are raw; train the decoders"),
        (CacheSpec.preset("kivi-2"), "decoders", None, "its keys are not sketched"),
        (LINEAR, "lora", None, "belongs to 'lora', where it is at least 1"),
        (LINEAR, "everything", 4, "belongs to 'lora'"),
        (LINEAR, "nothing", None, "must be one of temperatures, decoders"),
    ],
)
def test_a_scope_without_a_sense_is_refused(spec, trained, rank, message):
    with pytest.raises(ValueError, match=message):
        Scope(spec, trained, rank)
