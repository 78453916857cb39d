import jax
import jax.numpy as jnp
import pytest

from h1bjax import compile as compiling
from h1bjax.compile import GPU_OPTIONS, decoding_options, jit_decoding


@jit_decoding(static_argnames="times")
def grow(x, *, times):
    """Doubles."""
    return x * 2**times


def test_it_runs_and_nests_like_a_jit():
    assert grow(jnp.ones(2), times=3).tolist() == [8.0, 8.0]
    assert jax.jit(lambda x: grow(x, times=1))(jnp.ones(2)).tolist() == [2.0, 2.0]
    assert jax.grad(lambda x: grow(x, times=2).sum())(jnp.ones(2)).tolist() == [4.0, 4.0]
    assert jax.jit(jax.vmap(lambda x: grow(x, times=1)))(jnp.ones((3, 2))).shape == (3, 2)


def test_it_compiles_once_for_each_shape():
    for _ in range(2):
        grow(jnp.ones(5), times=1)
    before = grow.compiled._cache_size()
    grow(jnp.zeros(5), times=1)
    assert grow.compiled._cache_size() == before
    grow(jnp.zeros(6), times=1)
    assert grow.compiled._cache_size() == before + 1


def test_only_gpus_get_options(monkeypatch):
    assert (decoding_options() != {}) == (jax.default_backend() == "gpu")
    monkeypatch.setattr(compiling.jax, "default_backend", lambda: "gpu")
    assert decoding_options() == dict(GPU_OPTIONS)


@pytest.mark.parametrize("name", GPU_OPTIONS)
def test_the_compiler_knows_the_options(name):
    options = {name: GPU_OPTIONS[name]}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(jnp.ones(1)) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={name + "_x": 1})(jnp.ones(1))
