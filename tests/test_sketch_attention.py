import re
from dataclasses import replace
from functools import partial
from typing import Any

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch_cases import CASES, KERNEL_CASES, SketchCase, build, cases

from pallas_kernels.sketch_attention import (
    PackedKeys,
    PackedValues,
    Partial,
    SketchQuery,
    merge,
    sketch_attention,
    softmax_partial,
)
from pallas_kernels.sketch_attention.choice import implementation_named

merge_jitted = jax.jit(merge)


def attend_as(implementation: str) -> Any:
    function = partial(sketch_attention, implementation=implementation)  # type: ignore[arg-type]
    return jax.jit(function, static_argnames="start")


attend = attend_as("xla")


class TestDefinition:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_it_is_exact_against_float64_over_the_same_codes(self, case):
        assert_exact(case)

    @settings(deadline=None, max_examples=5)
    @given(case=cases())
    def test_it_is_exact_for_any_cache(self, case):
        assert_exact(case)

    def test_parts_merge_into_the_whole(self):
        arguments, answer = build(SketchCase(capacity=256, queries=3, stops=(256, 97, 3)))
        query, keys, values, layer, _, stop = arguments
        parts = [
            attend(query, keys, values, layer, start=start, stop=jnp.minimum(stop, end))
            for start, end in ((0, 4), (4, 100), (100, 256))
        ]
        assert_close(merge_jitted(merge_jitted(parts[0], parts[1]), parts[2]), answer)


def assert_exact(case: SketchCase) -> None:
    (query, keys, values, layer, start, stop), answer = build(case)
    assert_close(attend(query, keys, values, layer, start=start, stop=stop), answer)


def assert_close(partial: Partial, answer) -> None:
    assert partial.output.dtype == partial.lse.dtype == jnp.float32
    largest = max(1.0, np.abs(answer[0]).max())
    np.testing.assert_allclose(partial.output, answer[0], rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(partial.lse, answer[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
class TestEveryKernel:
    """Tensor cores multiply float16, so kernels are held to an error of the whole output."""

    @pytest.mark.parametrize(
        "case", (CASES | KERNEL_CASES).values(), ids=list(CASES | KERNEL_CASES)
    )
    def test_it_is_near_float64_over_the_same_codes(self, implementation, case):
        assert_near(implementation, case)

    # One query of a usual width: of other caches kernels would refuse nearly all.
    @settings(deadline=None, max_examples=25)
    @given(case=cases(head_dims=(64, 96, 128, 256), queries=1))
    def test_it_is_near_for_any_cache(self, implementation, case):
        assert_near(implementation, case)

    def test_longer_rows_do_not_compile_again(self, implementation):
        pytest.importorskip("jax_triton" if implementation == "triton" else "jax")
        query, keys, values, layer, start, stop = build(KERNEL_CASES["long rows"])[0]
        run = attend_as(implementation)
        for end in (4096, 5, 129, 4000):
            run(query, keys, values, layer, start=start, stop=jnp.full_like(stop, end))
            assert run._cache_size() == 1


def assert_near(implementation: str, case: SketchCase) -> None:
    if implementation == "triton":
        pytest.importorskip("jax_triton")
    (query, keys, values, layer, start, stop), answer = build(case)
    run = partial(attend_as(implementation), query, keys, values, layer, start=start, stop=stop)
    module = implementation_named(implementation)  # type: ignore[arg-type]
    refusal = module.refusal(query, keys, values)
    if refusal is not None:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            run()
        return
    float64.assert_near(run(), answer.output, answer.lse, 2e-3, rtol=1e-3, atol=1e-2)


def test_the_cases_with_empty_rows_have_them():
    for name in ("rows that see nothing", "no row sees anything"):
        _, answer = build(CASES[name])
        assert np.isneginf(answer.lse).any()
        assert (answer.output[np.isneginf(answer.lse)] == 0).all()


# Gradients


@pytest.mark.parametrize(
    "case",
    [
        SketchCase(head_dim=32, bits=32, batch=3, stops=(128, 5, 0), variance=True),
        pytest.param(
            SketchCase(head_dim=8, bits=32, batch=3, stops=(1152, 5, 0), capacity=1152, period=64),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["variance", "period and two blocks"],
)
def test_gradients_are_slopes_and_finite_beside_empty_rows(case):
    (query, keys, values, layer, start, stop), _ = build(case)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), query)
    weight = jnp.asarray(rng.normal(size=query.vectors.shape), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(query):
        partial = sketch_attention(query, keys, values, layer, start=start, stop=stop)
        lse = jnp.where(jnp.isneginf(partial.lse), 0.0, partial.lse)
        return jnp.sum(weight * partial.output) + jnp.sum(lse)

    gradient = loss(query)[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if query.rope is not None:
        # Angles grow with the position, so no step is small enough for all of them.
        still = jnp.zeros_like(query.rope.frequencies)
        direction = replace(direction, rope=replace(direction.rope, frequencies=still))
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    step = 3e-3
    ahead, behind = (
        loss(jax.tree.map(lambda x, d, amount=amount: x + amount * d, query, direction))[0]
        for amount in (step, -step)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-2)


def test_a_huge_logit_that_is_not_visible_leaves_outputs_and_gradients_finite():
    logits = jnp.asarray([[[[1.0, 2.0, 500.0]], [[500.0, 500.0, 500.0]]]])
    visible = jnp.asarray([[[[True, True, False]], [[False, False, False]]]])
    values = jnp.eye(3)[None]

    @jax.jit
    def loss(logits, values):
        output, lse = softmax_partial(logits, visible, values)
        return jnp.sum(output[..., 0]) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse))

    for gradient in jax.grad(loss, argnums=(0, 1))(logits, values):
        assert np.isfinite(gradient).all()


# Merging


def random_part(rng: np.random.Generator, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and values of 2 heads, 3 groups, 2 queries and so many keys."""
    return rng.normal(size=(2, 3, 2, keys)) * 20, rng.normal(size=(2, keys, 5))


@jax.jit
def attend_part(logits, values) -> Partial:
    return softmax_partial(
        logits.astype(jnp.float32), jnp.ones(logits.shape, bool), values.astype(jnp.float32)
    )


EMPTY = Partial(jnp.zeros((2, 3, 2, 5)), jnp.full((2, 3, 2), -jnp.inf))


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.sampled_from((0, 1, 2, 7)), min_size=2, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_parts_are_attention_over_the_union_in_any_order(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [random_part(rng, size) for size in sizes]
    partials = [attend_part(*part) if part[0].shape[-1] else EMPTY for part in parts]
    forwards = backwards = EMPTY
    for part in partials:
        forwards = merge_jitted(forwards, part)
        backwards = merge_jitted(part, backwards)
    paired = merge_jitted(partials[0], _merge_all(partials[1:]))

    logits = np.concatenate([logits for logits, _ in parts], axis=-1)
    values = np.concatenate([values for _, values in parts], axis=1)
    if logits.shape[-1]:
        highest = logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits - highest)
        output = np.einsum("hgqt,htd->hgqd", weights, values) / weights.sum(-1, keepdims=True)
        answer = output, highest[..., 0] + np.log(weights.sum(axis=-1))
    else:
        answer = EMPTY
    for merged in (forwards, backwards, paired):
        assert_close(merged, answer)


def _merge_all(partials: list[Partial]) -> Partial:
    merged = EMPTY
    for part in reversed(partials):
        merged = merge_jitted(part, merged)
    return merged


def test_merging_with_nothing_changes_nothing():
    part = attend_part(*random_part(np.random.default_rng(0), 3))
    for merged in (merge_jitted(part, EMPTY), merge_jitted(EMPTY, part)):
        np.testing.assert_allclose(merged.output, part.output, rtol=1e-6)
        np.testing.assert_array_equal(merged.lse, part.lse)
    nothing = merge_jitted(EMPTY, EMPTY)
    assert np.isneginf(nothing.lse).all()
    assert (nothing.output == 0).all()


def test_the_gradient_of_a_merge_with_nothing_is_finite():
    part = attend_part(*random_part(np.random.default_rng(0), 3))

    @jax.jit
    def loss(first, second):
        merged = merge(first, second)
        return jnp.sum(merged.output) + jnp.sum(jnp.where(jnp.isneginf(merged.lse), 0, merged.lse))

    for first, second in ((part, EMPTY), (EMPTY, part), (EMPTY, EMPTY)):
        for leaf in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(first, second)):
            assert np.isfinite(leaf).all()


# Errors


def replaced(name: str, shape: tuple[int, ...]):
    """A call that fits together but for one array."""
    arrays = {
        "vectors": (2, 1, 4, 64),
        "transform": (2, 64, 64),
        "scale": (4,),
        "variance": (2, 1, 4),
        "keys": (3, 2, 4, 256),
        "scales": (3, 2, 4, 128),
        "values": (3, 2, 16, 256),
        "affine": (3, 2, 2, 256),
    } | {name: shape}
    dtypes = {"keys": jnp.int32, "scales": jnp.uint16, "values": jnp.int32, "affine": jnp.int32}
    zeros = {
        name: jnp.zeros(shape, dtypes.get(name, jnp.float32))
        for name, shape in arrays.items()
        if shape
    }
    query = SketchQuery(
        zeros["vectors"], zeros["transform"], zeros["scale"], variance=zeros["variance"]
    )
    keys = PackedKeys(zeros["keys"], zeros.get("scales"))
    return query, keys, PackedValues(zeros["values"], zeros["affine"], 4)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("keys", (3, 2, 3, 256), r"keys.words is int32 \(3, 2, 3, 256\), expected int32 \(3, 2, 4"),
        ("scales", (3, 2, 4, 256), r"keys.scales .* expected \w+ \(3, 2, 4, 128\)"),
        ("values", (3, 2, 8, 256), r"values.words .* expected \w+ \(3, 2, 16, 256\)"),
        ("values", (2, 2, 16, 256), r"values.words .* expected \w+ \(3, 2, 16, 256\)"),
        ("affine", (3, 2, 4, 256), r"values.affine .* expected \w+ \(3, 2, 2, 256\)"),
        ("transform", (2, 64, 72), "a sketch of 72 bits does not pack into 32-bit words"),
        ("transform", (2, 32, 64), "the transform takes 32 channels, queries have 64"),
        ("vectors", (2, 1, 3, 64), "3 query heads are not a multiple of 2 KV heads"),
        ("vectors", (1, 1, 4, 64), "1 rows of queries for 2 rows of keys"),
        ("keys", (3, 2, 4, 200), "200 tokens are not a multiple of 128"),
        ("scales", (), "a variance correction needs the scalars of the keys"),
        ("scale", (2,), r"query.scale has shape \(2,\), expected \(4,\)"),
        ("variance", (2, 4), r"query.variance has shape \(2, 4\), expected \(2, 1, 4\)"),
    ],
)
def test_arrays_that_do_not_describe_one_cache_are_refused(name, shape, message):
    query, keys, values = replaced(name, shape)
    stop = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=message):
        sketch_attention(query, keys, values, jnp.int32(0), start=0, stop=stop)


def test_scalars_of_another_dtype_are_refused():
    query, keys, values = replaced("scale", (4,))
    assert keys.scales is not None
    keys = PackedKeys(keys.words, keys.scales.astype(jnp.float32))
    stop = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"keys.scales is float32 .*, expected uint16"):
        sketch_attention(query, keys, values, jnp.int32(0), start=0, stop=stop)


def test_the_arrays_that_those_errors_start_from_are_accepted():
    query, keys, values = replaced("scale", (4,))
    stop = jnp.zeros((2, 1), jnp.int32)
    result = sketch_attention(query, keys, values, jnp.int32(0), start=0, stop=stop)
    assert np.isneginf(result.lse).all()


@pytest.mark.parametrize("period", [96, 0])
def test_a_period_that_does_not_divide_the_block_is_refused(period):
    (query, keys, values, layer, start, stop), _ = build(SketchCase(period=32, stops=(0,)))
    assert query.rope is not None
    query = replace(query, rope=replace(query.rope, period=period))
    with pytest.raises(ValueError, match=f"a RoPE period of {period} does not divide 128"):
        sketch_attention(query, keys, values, layer, start=start, stop=stop)


def test_stops_planes_and_widths_that_do_not_exist_are_refused():
    query, keys, values = replaced("scale", (4,))
    stop = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"stop has shape \(2,\), expected \(2, 1\)"):
        sketch_attention(query, keys, values, jnp.int32(0), start=0, stop=stop[:, 0])
    three, single = replace(query, planes=3), replace(values, bits=1)
    with pytest.raises(ValueError, match="1 or 2 planes, not 3"):
        sketch_attention(three, keys, values, jnp.int32(0), start=0, stop=stop)
    with pytest.raises(ValueError, match="values have 4, 3 or 2 bits, not 1"):
        sketch_attention(query, keys, single, jnp.int32(0), start=0, stop=stop)


def test_all_problems_are_reported_together():
    query, keys, values = replaced("transform", (2, 32, 72))
    stop = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="takes 32 channels") as error:
        sketch_attention(query, keys, values, jnp.int32(0), start=0, stop=stop)
    assert "72 bits does not pack" in str(error.value)
