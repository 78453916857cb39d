"""Training on a mesh of virtual devices comes to what one device comes to."""

import jax
import numpy as np
import pytest
from small_model import random_parameters, small_config

from h1bjax.cache import CacheSpec
from h1bjax.model import random_projections
from train.placement import Placement
from train.step import Recipe, initial_state, train_step
from train.student import Origin, Scope, fixed_arrays, trained_arrays

pytestmark = pytest.mark.once

CONFIG = small_config(tie_word_embeddings=True)
SPEC = CacheSpec.preset("h1b-2plane-v2").replace(sinks=2, window=6)
MESH = "batch=4,tensor=2"


@pytest.fixture(autouse=True)
def _enough_devices():
    if len(jax.devices()) != 8:
        pytest.skip("needs eight virtual devices")


def placed(scope, mesh):
    """The state before the first step, what stays, and where things are."""
    codec, rotation = random_projections(CONFIG, SPEC, seed=0)
    origin = Origin(random_parameters(CONFIG), codec, rotation)
    placement = Placement.create(CONFIG, mesh, rows=4)
    recipe = Recipe(3, 1e-3, 1, 0.1, dtype="float32", scope=scope, distillation=1.0)
    trained = placement.place(trained_arrays(CONFIG, scope, origin, jax.random.key(0)))
    state = initial_state(trained, recipe)
    state = jax.device_put(state, placement.of_tree(state))
    fixed = fixed_arrays(scope, origin, recipe.dtype, taught_by=origin.weights)
    return state, placement.place(fixed), placement, recipe


@pytest.mark.parametrize(
    "scope",
    [Scope(SPEC), pytest.param(Scope(SPEC, "lora", 2), marks=pytest.mark.slow)],
    ids=lambda scope: scope.trained,
)
def test_steps_on_a_mesh_are_those_on_one_device(scope):
    windows = np.random.default_rng(0).integers(0, 50, (4, 25)).astype(np.int32)
    ends = []
    for mesh in (None, MESH):
        state, fixed, placement, recipe = placed(scope, mesh)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        for _ in range(recipe.steps):
            batch = placement.place_rows(windows)
            state, metrics = train_step(state, fixed, batch, CONFIG, recipe)
        after = jax.tree.map(lambda leaf: leaf.sharding, state)
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True)
        assert all(leaf.sharding.is_equivalent_to(place, leaf.ndim) for leaf, place in leaves), (
            after
        )
        ends.append((state.parameters, metrics))
    (parameters, metrics), (expected, expected_metrics) = ends[1], ends[0]
    for one, other in zip(jax.tree.leaves(metrics), jax.tree.leaves(expected_metrics), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)
    for name, array in expected.items():
        # Adam divides by the size of each gradient, so small ones show rounding.
        np.testing.assert_allclose(parameters[name], array, atol=2e-3, err_msg=name)


def test_arrays_are_divided_by_heads_and_hidden_channels():
    state, fixed, _, _ = placed(Scope(SPEC, "lora", 2), MESH)
    shapes = {
        name: array.sharding.shard_shape(array.shape)
        for name, array in {**fixed, **state.parameters}.items()
    }
    assert shapes["query"] == (2, 32, 2, 32)
    assert shapes["key"] == (2, 32, 1, 32)
    assert shapes["down"] == (2, 24, 32)
    assert shapes["embedding"] == (25, 32)
    assert shapes["attention_norm"] == (2, 32)
    assert shapes["codec/projection"] == (2, 1, 32, 32)
    assert shapes["value_rotation"] == (2, 1, 32, 32)
    assert shapes["lora/output/in"] == (2, 2, 32, 2)
    assert shapes["lora/output/out"] == (2, 2, 32)
    assert shapes["lora/query/out"] == (2, 2, 2, 32)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (2, 4, 32, 2)]
    assert {leaf.sharding.shard_shape(leaf.shape) for leaf in moments} == {(2, 2, 32, 2)}


@pytest.mark.parametrize(
    ("mesh", "rows", "message"),
    [
        ("sequence=2,batch=4", 4, "does not divide the tokens of a row"),
        ("batch=8", 4, "batch=8 of the mesh does not divide the 4 rows"),
        ("tensor=8", 8, "does not divide the model's 2 KV heads"),
        ("batch", 4, "a mesh is written like"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, rows, message):
    with pytest.raises(ValueError, match=message):
        Placement.create(CONFIG, mesh, rows)
