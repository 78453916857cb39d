"""Attention to keys and values that are stored as they are, against float64."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import float64
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.exact_attention import exact_attention


@dataclass(frozen=True)
class ExactCase:
    """One random cache and the queries that read it."""

    head_dim: int = 64
    groups: int = 4
    kv_heads: int = 2
    tokens: int = 64
    layers: int = 2
    queries: int = 1
    start: int = 0
    stops: tuple[int, ...] = (64, 37)
    """Of each row."""
    opposed: bool = False
    """Whether all keys point away from the first query of each KV head."""
    seed: int = 0


EDGES = ExactCase(tokens=256, stops=(0, 1, 15, 16, 17, 127, 128, 129, 256))
CASES = {
    "a window": ExactCase(),
    "edges of a tile": EDGES,
    "a start inside a tile": replace(EDGES, start=4),
    "the last token only": ExactCase(start=63, stops=(64, 63)),
    "logits far below zero": replace(EDGES, opposed=True),
    "long rows": ExactCase(tokens=4096, stops=(4096, 3001), head_dim=128),
    "one query head": ExactCase(groups=1, kv_heads=4, head_dim=128),
    "eleven query heads": ExactCase(groups=11),
    "sixteen query heads of 96 channels": ExactCase(groups=16, kv_heads=1, head_dim=96),
    "256 channels": ExactCase(head_dim=256, tokens=256, stops=(256, 5)),
    "one row": ExactCase(tokens=1024, stops=(1000,)),
}


class Built(NamedTuple):
    """Arguments of `exact_attention`, and the answer in float64."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: np.ndarray
    lse: np.ndarray


def build(case: ExactCase) -> Built:
    """Draws bfloat16 queries, keys and values, and attends to them in float64."""
    rng = np.random.default_rng(case.seed)
    batch, heads = len(case.stops), case.kv_heads * case.groups
    stored = (case.layers, batch, case.tokens, case.kv_heads, case.head_dim)
    query = rng.normal(size=(batch, case.queries, heads, case.head_dim))
    keys, values = rng.normal(size=stored), rng.normal(size=stored)
    if case.opposed:
        keys = 0.3 * keys - 4.0 * query[None, :, :1, :: case.groups]
    query, keys, values = (x.astype(ml_dtypes.bfloat16) for x in (query, keys, values))
    layer = case.layers - 1
    output = np.zeros(query.shape)
    lse = np.zeros(query.shape[:3])
    position = np.arange(case.tokens)
    for b, t, h in np.ndindex(lse.shape):
        k = h // case.groups
        logits = keys[layer, b, :, k].astype(np.float64) @ query[b, t, h].astype(np.float64)
        visible = (position >= case.start) & (position < case.stops[b])
        output[b, t, h], lse[b, t, h] = float64.softmax_attention(
            logits / case.head_dim**0.5, visible, values[layer, b, :, k].astype(np.float64)
        )
    halves = [jnp.asarray(x.reshape(*x.shape[:3], -1).view(np.uint16)) for x in (keys, values)]
    stop = jnp.broadcast_to(jnp.asarray(case.stops, jnp.int32)[:, None], query.shape[:2])
    options = {"dtype": jnp.bfloat16, "start": case.start, "stop": stop}
    return Built((jnp.asarray(query), *halves, jnp.int32(layer)), options, output, lse)


def assert_near(implementation: Any, case: ExactCase, tolerance: float) -> None:
    arguments, options, output, lse = build(case)
    stop = options.pop("stop")
    attend = partial(exact_attention, **options, implementation=implementation)
    found = jax.jit(lambda *arrays, stop: attend(*arrays, stop=stop))(*arguments, stop=stop)
    assert found.output.dtype == found.lse.dtype == jnp.float32
    float64.assert_near(found, output, lse, tolerance, rtol=tolerance, atol=tolerance)


@pytest.mark.once
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_definition_is_exact(case):
    assert_near("xla", case, 1e-5)


@pytest.mark.once
def test_the_definition_takes_several_queries():
    assert_near("xla", ExactCase(queries=3), 1e-5)


# The kernel rounds weights to bfloat16, by up to 2⁻⁹.
near = partial(assert_near, "mosaic_gpu", tolerance=2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_is_near_float64(case):
    near(case)


@pytest.mark.gpu
@settings(deadline=None, max_examples=15)
@given(
    case=st.builds(
        ExactCase,
        head_dim=st.sampled_from((48, 64, 96, 128, 256)),
        groups=st.integers(1, 16),
        kv_heads=st.integers(1, 4),
        tokens=st.integers(1, 20).map(lambda tiles: 16 * tiles),
        start=st.integers(0, 40),
        stops=st.lists(st.integers(-20, 340), min_size=1, max_size=4).map(tuple),
        seed=st.integers(0, 2**32 - 1),
    )
)
def test_the_kernel_is_near_float64_for_any_cache(case):
    near(case)


@pytest.mark.once
def test_arrays_that_do_not_fit_are_all_named():
    query = jnp.zeros((2, 1, 5, 64), jnp.bfloat16)
    keys, values = jnp.zeros((1, 3, 64, 128), jnp.uint16), jnp.zeros((1, 3, 32, 128), jnp.uint16)
    message = (
        r"must be alike; keys uint16 do not hold float32; 2 rows of queries for 3 rows of keys; "
        r"5 query heads are not a multiple of 2 KV heads; stop has shape \(2,\), expected \(2, 1\)"
    )
    with pytest.raises(ValueError, match=message):
        exact_attention(
            query,
            keys,
            values,
            jnp.int32(0),
            dtype=jnp.float32,
            start=0,
            stop=jnp.zeros(2, jnp.int32),
        )
