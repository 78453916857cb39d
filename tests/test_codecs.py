from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch_cases import HEAD_DIMS

from h1bjax.cache import (
    CacheSpec,
    ChannelQuantisedKeys,
    CodecParameters,
    GaussianSigns,
    LinearCode,
    OrthogonalSigns,
    QuantisedValues,
    TwoPlanes,
    random_rotation,
)
from h1bjax.cache.channel_keys import channel_scores
from h1bjax.cache.scoring import half_variance
from pallas_kernels.packing import pack_column

pytestmark = pytest.mark.once

BFLOAT16 = 2.0**-8
"""Relative error of rounding to bfloat16, and room to spare."""


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init(codec, layers: int, kv_heads: int, head_dim: int, seed: int) -> CodecParameters:
    return codec.init(jax.random.key(seed), layers, kv_heads, kv_heads, head_dim)


def one_layer(codec, *, kv_heads: int = 2, head_dim: int = 64, seed: int = 0, mean: float = 0.0):
    """Parameters as the cache passes them to a codec: those of one layer."""
    stacked = init(codec, 1, kv_heads, head_dim, seed)
    parameters = jax.tree.map(lambda array: array[0], stacked)
    shift = np.random.default_rng(seed + 1000).normal(size=(kv_heads, head_dim)) * mean
    parameters.mean[...] = jnp.asarray(shift, jnp.float32)
    return parameters


def random_keys(tokens: int, *, kv_heads: int = 2, head_dim: int = 64, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(tokens, kv_heads, head_dim)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def encode(codec, parameters, keys):
    encoded = codec.encode(parameters, keys)
    return encoded.signs, encoded.scale


def decode(codec, parameters: CodecParameters, signs, scale) -> np.ndarray:
    """`k - μ` as the transformed query reads it, in float64."""
    transform = np.asarray(codec.query_transform(parameters), np.float64)
    factor = 1.0 if scale is None else np.asarray(scale, np.float64)[..., None]
    return factor * np.einsum("tkc,kdc->tkd", np.asarray(signs, np.float64), transform)


def projected(parameters: CodecParameters, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 `k - μ` and its coordinates."""
    centred = np.asarray(keys, np.float64) - np.asarray(parameters.mean[...], np.float64)
    projection = np.asarray(parameters.projection[...], np.float64)
    return centred, np.einsum("tkd,kcd->tkc", centred, projection)


# Projections


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", [OrthogonalSigns(), TwoPlanes()], ids=["signs", "two planes"])
def test_default_projections_lose_nothing(codec, head_dim):
    r = np.asarray(one_layer(codec, head_dim=head_dim).projection[...])
    assert r.shape[1] >= head_dim
    identity = np.broadcast_to(np.eye(head_dim), (2, head_dim, head_dim))
    np.testing.assert_allclose(np.einsum("kcd,kce->kde", r, r), identity, atol=1e-5)


@pytest.mark.parametrize(("bits", "head_dim"), [(32, 48), (64, 128), (96, 256)])
def test_fewer_bits_than_channels_look_at_orthonormal_directions(bits, head_dim):
    r = np.asarray(one_layer(OrthogonalSigns(bits), head_dim=head_dim).projection[...])
    identity = np.broadcast_to(np.eye(bits), (2, bits, bits))
    np.testing.assert_allclose(np.einsum("kcd,ked->kce", r, r), identity, atol=1e-5)


@pytest.mark.parametrize("codec", [OrthogonalSigns(), TwoPlanes(), GaussianSigns()])
def test_projections_depend_on_the_seed_the_layer_and_the_head(codec):
    first, again, other = (
        np.asarray(init(codec, 2, 2, 32, seed).projection[...]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    matrices = [*first.reshape(4, *first.shape[2:]), *other.reshape(4, *other.shape[2:])]
    for index, one in enumerate(matrices):
        for another in matrices[index + 1 :]:
            assert np.abs(one - another).max() > 0.1


def test_the_paper_projects_with_unit_gaussians():
    r = np.asarray(one_layer(GaussianSigns(), kv_heads=4, head_dim=128).projection[...])
    assert r.shape == (4, 256, 128)
    np.testing.assert_allclose([r.mean(), r.std()], [0.0, 1.0], atol=0.01)


CODECS = [OrthogonalSigns(), TwoPlanes(), GaussianSigns(), LinearCode(1.5)]


@pytest.mark.parametrize("codec", CODECS, ids=["signs", "two planes", "paper", "linear"])
def test_every_codec_starts_for_every_head_dim(codec):
    for head_dim in HEAD_DIMS:
        rng = jax.eval_shape(lambda: jax.random.key(0))
        shapes = partial(codec.init, layers=2, kv_heads=3, heads=6, head_dim=head_dim)
        parameters = jax.eval_shape(shapes, rng)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parameters))
        assert parameters.mean.shape == (2, 3, head_dim)
        assert parameters.temperature.shape == parameters.offset.shape == (2, 6)
        layer = jax.eval_shape(lambda p: jax.tree.map(lambda array: array[0], p), parameters)
        transform = jax.eval_shape(codec.query_transform, layer)
        assert transform.shape == (3, head_dim, codec.sketch_bits(head_dim))


@pytest.mark.parametrize("codec", CODECS, ids=["signs", "two planes", "paper", "linear"])
def test_a_codec_starts_without_a_mean_and_with_a_neutral_temperature(codec):
    parameters = init(codec, 1, 2, 64, 0)
    assert not parameters.mean[...].any()
    assert (parameters.temperature[...] == 1).all()
    assert not parameters.offset[...].any()


# Signs


@pytest.mark.parametrize("codec", [OrthogonalSigns(), TwoPlanes(), GaussianSigns(64)])
def test_the_first_plane_holds_the_signs_of_the_projected_key(codec):
    parameters = one_layer(codec, mean=1.0)
    keys = random_keys(50)
    signs, _ = encode(codec, parameters, keys)
    _, u = projected(parameters, keys)
    np.testing.assert_array_equal(signs[..., : u.shape[-1]], np.sign(u))


@pytest.mark.parametrize("codec", [OrthogonalSigns(), TwoPlanes(), GaussianSigns(64)])
def test_the_sign_of_zero_is_plus_and_its_scalar_is_zero(codec):
    parameters = one_layer(codec, mean=1.0)
    keys = parameters.mean[...][None]
    signs, scale = encode(codec, parameters, keys)
    components = parameters.projection.shape[1]
    assert (signs[..., :components] == 1).all()
    if codec.scaled:
        assert (scale == 0).all()
        assert scale.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("codec", "head_dim"),
    [
        (OrthogonalSigns(), 64),
        (OrthogonalSigns(), 48),
        (OrthogonalSigns(256), 64),
        (OrthogonalSigns(32), 64),
        (TwoPlanes(), 64),
        (TwoPlanes(), 8),
    ],
)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_scalar_makes_a_decoded_key_exact_along_the_key(codec, head_dim, size):
    parameters = one_layer(codec, head_dim=head_dim, mean=size)
    keys = size * random_keys(50, head_dim=head_dim)
    signs, scale = encode(codec, parameters, keys)
    centred, _ = projected(parameters, keys)
    along = (centred * decode(codec, parameters, signs, scale)).sum(axis=-1)
    np.testing.assert_allclose(along, np.square(centred).sum(axis=-1), rtol=BFLOAT16)


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_two_planes_are_the_documented_code(head_dim):
    codec = TwoPlanes()
    parameters = one_layer(codec, head_dim=head_dim, mean=0.5)
    keys = random_keys(60, head_dim=head_dim)
    signs, scale = encode(codec, parameters, keys)
    centred, u = projected(parameters, keys)

    components = u.shape[-1]
    threshold = 0.98 * np.linalg.norm(u, axis=-1, keepdims=True) / components**0.5
    code = np.where(np.abs(u) > threshold, 3, 1) * np.where(u >= 0, 1, -1)
    assert set(np.unique(code)) == {-3, -1, 1, 3}
    np.testing.assert_array_equal(2 * signs[..., :components] + signs[..., components:], code)
    expected = np.square(centred).sum(axis=-1) / (u * code).sum(axis=-1)
    np.testing.assert_allclose(np.asarray(scale, np.float64), expected, rtol=BFLOAT16)
    r = np.asarray(parameters.projection[...], np.float64)
    by_hand = np.asarray(scale, np.float64)[..., None] * np.einsum("tkc,kcd->tkd", code, r)
    np.testing.assert_allclose(decode(codec, parameters, signs, scale), by_hand, atol=1e-5)


def test_codecs_encode_bfloat16_keys_in_float32():
    keys = jnp.asarray(random_keys(40), jnp.bfloat16)
    for codec in (OrthogonalSigns(), TwoPlanes(), GaussianSigns(), LinearCode(2.0)):
        parameters = one_layer(codec, mean=0.3)
        narrow, wide = (encode(codec, parameters, k) for k in (keys, keys.astype(jnp.float32)))
        np.testing.assert_array_equal(narrow[0], wide[0])
        if codec.scaled:
            np.testing.assert_array_equal(narrow[1], wide[1])


# Variance


@pytest.mark.parametrize(
    ("codec", "head_dim"),
    [
        (OrthogonalSigns(), 64),
        (OrthogonalSigns(), 128),
        (OrthogonalSigns(), 48),
        (OrthogonalSigns(128), 64),
        (OrthogonalSigns(32), 64),
        (OrthogonalSigns(64), 128),
        (TwoPlanes(), 64),
        (TwoPlanes(), 128),
    ],
)
def test_the_variance_of_a_logit_over_random_rotations_is_the_documented_one(codec, head_dim):
    rotations, pairs = 200, 60
    rng = np.random.default_rng(0)
    # A few keys far from Gaussian: only the rotations are random.
    keys = rng.normal(size=(pairs, head_dim)) ** 3
    queries = rng.normal(size=(pairs, head_dim))
    along = (keys * queries).sum(-1, keepdims=True) / np.square(keys).sum(-1, keepdims=True)
    queries -= along * keys

    parameters = one_layer(codec, kv_heads=rotations, head_dim=head_dim)
    repeated = np.repeat(keys[:, None], rotations, axis=1).astype(np.float32)
    signs, scale = encode(codec, parameters, repeated)
    logits = np.einsum("td,trd->tr", queries, decode(codec, parameters, signs, scale))
    logits /= head_dim**0.5

    kappa, directions = codec.noise(head_dim)
    energy = np.square(queries).sum(axis=-1) * np.square(keys).sum(axis=-1)
    documented = kappa * energy / (head_dim * directions)
    measured = np.square(logits).mean(axis=1)
    np.testing.assert_allclose(np.mean(measured / documented), 1.0, atol=0.05)

    # The same from what is stored, as the correction of a score computes it.
    spec = CacheSpec("any", codec, scores="corrected")
    read = jnp.asarray(queries, jnp.float32)[None, :, None]
    half = np.asarray(half_variance(spec, codec, read))[0, :, 0]
    code = np.asarray(signs)
    if codec.planes == 2:
        first, second = np.split(code, 2, axis=-1)
        code = 2 * first + second
    stored = np.square(np.asarray(scale, np.float64)) * np.square(code).sum(axis=-1)
    np.testing.assert_allclose(np.mean(half * stored.mean(axis=1) / documented), 0.5, atol=0.015)


def test_the_constants_of_the_variance():
    assert OrthogonalSigns().noise(128) == pytest.approx((np.pi / 2 - 1, 127))
    assert TwoPlanes().noise(128) == (0.132, 127)
    assert GaussianSigns().noise(128) is None
    assert LinearCode().noise(128) is None


def test_the_variance_of_bfloat16_queries_is_computed_in_float32():
    codec = OrthogonalSigns()
    spec = CacheSpec("any", codec, scores="corrected")
    query = jnp.asarray(random_keys(5)[None], jnp.bfloat16)
    narrow = half_variance(spec, codec, query)
    wide = half_variance(spec, codec, query.astype(jnp.float32))
    assert narrow is not None
    assert wide is not None
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)


# Linear codes


@st.composite
def transform_codings(draw: st.DrawFn):
    """Head dimension, bits, and how many of the bits each component of two heads gets."""
    head_dim, bits = draw(st.sampled_from([(8, 32), (32, 32), (32, 96), (48, 64), (64, 64)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    depths = np.zeros((2, head_dim), int)
    for head in depths:
        for _ in range(bits):
            # At most 7 bits for a component, and none for some.
            open_components = np.flatnonzero(head < 7)
            head[rng.choice(open_components[: len(open_components) // 2 + 1])] += 1
    return head_dim, bits, depths, rng


@settings(deadline=None, max_examples=12)
@given(coding=transform_codings())
def test_a_linear_code_can_be_any_transform_coding_with_uniform_quantisers(coding):
    head_dim, bits, depths, rng = coding
    basis = np.linalg.qr(rng.normal(size=(2, head_dim, head_dim)))[0]  # rows are directions
    steps = rng.uniform(0.05, 1.0, (2, head_dim))
    mean = rng.normal(size=(2, head_dim))

    projection, transform = np.zeros((2, bits, head_dim)), np.zeros((2, head_dim, bits))
    levels, weight = np.zeros((2, bits)), np.zeros((2, bits))
    for head in range(2):
        columns = [(i, j) for i in range(head_dim) for j in range(depths[head, i])]
        for bit, column in enumerate(rng.permutation(len(columns))):
            i, j = columns[column]
            projection[head, bit] = basis[head, i] / steps[head, i]
            levels[head, bit] = 2 ** (depths[head, i] - 1)
            weight[head, bit] = 2**j
            transform[head, :, bit] = 2**j * steps[head, i] / 2 * basis[head, i]
    parameters = CodecParameters(
        *(jnp.asarray(x, jnp.float32) for x in (projection, mean, np.ones(2), np.zeros(2))),
        *(jnp.asarray(x, jnp.float32) for x in (transform, levels, weight)),
    )
    codec = LinearCode(bits / head_dim, scaled=False)
    keys = rng.normal(size=(30, 2, head_dim)).astype(np.float32)
    signs, scale = encode(codec, parameters, keys)
    assert scale is None

    coordinate = np.einsum("tkd,kid->tki", keys - mean, basis)
    # 2ⁿ cells of one step around 0, the outer ones open; a component without bits is 0.
    highest = (2.0**depths - 1) / 2
    cell = np.clip(np.floor(coordinate / steps + 2.0**depths / 2), 0, 2.0**depths - 1)
    quantised = np.where(depths > 0, steps * (cell - highest), 0.0)
    expected = np.einsum("tki,kid->tkd", quantised, basis)
    border = np.abs(coordinate / steps - np.round(coordinate / steps)).min(axis=-1) < 1e-4
    decoded = decode(codec, parameters, signs, scale)
    np.testing.assert_allclose(decoded[~border], expected[~border], atol=1e-4)
    assert border.mean() < 0.1


def test_a_linear_code_of_one_bit_each_is_plain_signs():
    signs_codec = OrthogonalSigns()
    orthogonal = one_layer(signs_codec, mean=1.0)
    ones = jnp.ones((2, 64))
    linear = CodecParameters(
        orthogonal.projection[...],
        orthogonal.mean[...],
        orthogonal.temperature[...],
        orthogonal.offset[...],
        transform=signs_codec.query_transform(orthogonal),
        levels=ones,
        weight=ones,
    )
    keys = np.concatenate([random_keys(40), np.asarray(orthogonal.mean[...])[None]])
    codec = LinearCode(1.0, scaled=False)
    np.testing.assert_array_equal(
        encode(codec, linear, keys)[0], encode(signs_codec, orthogonal, keys)[0]
    )
    np.testing.assert_array_equal(
        codec.query_transform(linear), signs_codec.query_transform(orthogonal)
    )
    assert codec.logit_scale(64) == signs_codec.logit_scale(64) == 1 / 8


@pytest.mark.parametrize(("bits", "head_dim"), [(32, 8), (64, 128), (128, 64), (128, 48)])
def test_an_untuned_linear_code_quantises_unit_keys_to_within_its_steps(bits, head_dim):
    codec = LinearCode(bits / head_dim, scaled=False)
    parameters = one_layer(codec, head_dim=head_dim)
    keys = 0.5 * random_keys(100, head_dim=head_dim)
    signs, scale = encode(codec, parameters, keys)
    error = keys - decode(codec, parameters, signs, scale)
    # Cells of ±2 with n bits leave an error of step²/12; a component without bits its variance.
    depth = bits // head_dim + (np.arange(head_dim) < bits % head_dim)
    expected = np.where(depth > 0, (4 / 2.0**depth) ** 2 / 12, 0.25).mean()
    assert 0.5 * expected < np.square(error).mean() < 1.5 * expected


# The score of the paper


def test_the_score_of_the_paper_counts_differing_bits():
    codec, head_dim = GaussianSigns(96), 64
    parameters = one_layer(codec)
    keys, queries = random_keys(20), random_keys(7, seed=1)
    key_signs = np.asarray(encode(codec, parameters, keys)[0])
    projection = np.asarray(codec.query_transform(parameters), np.float64)
    query_signs = np.where(np.einsum("tkd,kdc->tkc", queries, projection) >= 0, 1.0, -1.0)
    scores = codec.logit_scale(head_dim) * np.einsum("qkc,tkc->kqt", query_signs, key_signs)

    packed_keys, packed_queries = (np.packbits(x > 0, axis=-1) for x in (key_signs, query_signs))
    differing = np.bitwise_count(packed_queries[:, None] ^ packed_keys[None]).sum(axis=-1)
    expected = head_dim**0.5 * (1 - 2 * differing.astype(float) / 96)
    np.testing.assert_allclose(scores, np.moveaxis(expected, -1, 0), atol=1e-12)


# Widths


@pytest.mark.parametrize(
    ("head_dim", "one_plane", "two_planes"),
    [
        (8, 32, 32),
        (32, 32, 64),
        (48, 64, 96),
        (64, 64, 128),
        (80, 96, 160),
        (96, 96, 192),
        (128, 128, 256),
        (256, 256, 512),
    ],
)
def test_default_sketch_widths(head_dim, one_plane, two_planes):
    assert OrthogonalSigns().sketch_bits(head_dim) == one_plane
    assert TwoPlanes().sketch_bits(head_dim) == two_planes
    assert GaussianSigns().sketch_bits(head_dim) == 256


@pytest.mark.parametrize("bits", [-32, 0, 1, 33, 100])
@pytest.mark.parametrize("codec", [GaussianSigns, OrthogonalSigns])
def test_a_width_that_does_not_pack_is_refused(codec, bits):
    with pytest.raises(ValueError, match=f"a sketch of {bits} bits does not pack"):
        codec(bits).sketch_bits(128)


def test_a_linear_code_has_the_bits_of_its_rate_whatever_the_rounding():
    for head_dim in range(8, 257, 2):
        for bits in range(32, 8 * head_dim + 1, 32):
            assert LinearCode(bits / head_dim).sketch_bits(head_dim) == bits


@pytest.mark.parametrize(
    ("rate", "head_dim", "bits"),
    [(1.0, 128, 128), (0.5, 128, 64), (2.0, 64, 128), (0.5, 80, 64), (1.0, 48, 64), (0.01, 8, 32)],
)
def test_bits_of_a_linear_code_are_rounded_up_to_whole_words(rate, head_dim, bits):
    assert LinearCode(rate).sketch_bits(head_dim) == bits


@pytest.mark.parametrize("rate", [-1.0, 0.0, 8.01, 128, float("nan"), float("inf")])
def test_other_rates_of_a_linear_code_are_refused(rate):
    with pytest.raises(ValueError, match=rf"rate={rate} bits per channel must be in \(0, 8\]"):
        LinearCode(rate).sketch_bits(128)


# Values


@partial(jax.jit, static_argnums=0)
def encode_values(codec, values):
    encoded = codec.encode(values)
    return encoded, codec.decode(encoded)


@settings(deadline=None, max_examples=30)
@given(
    bits=st.sampled_from((4, 3, 2)),
    group=st.sampled_from((None, 8)),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from((1e-30, 1e-6, 1.0, 1e4, 1e30)),
    shift=st.sampled_from((0.0, 0.1, -100.0)),
)
def test_a_value_is_read_to_within_half_a_step(bits, group, seed, size, shift):
    values = size * (np.random.default_rng(seed).normal(size=(9, 2, 32)) + shift)
    values = values.astype(np.float32)
    (codes, scale, zero), decoded = encode_values(QuantisedValues(bits, group=group), values)
    assert scale.dtype == zero.dtype == jnp.bfloat16
    top = 2**bits - 1
    assert codes.dtype == jnp.int32
    assert 0 <= codes.min() <= codes.max() <= top

    # All that share a scale and zero on the last axis.
    wide = values.astype(np.float64).reshape(9, 2, -1, group or 32)
    lowest, highest = wide.min(axis=-1), wide.max(axis=-1)
    np.testing.assert_allclose(np.asarray(zero, np.float64), lowest, rtol=BFLOAT16)
    span = highest - lowest
    np.testing.assert_allclose(np.asarray(scale, np.float64), span / top, rtol=BFLOAT16)
    # Half a step, and what the rounding of the zero and of all steps together can push out.
    allowed = span / top / 2 * (1 + BFLOAT16) + BFLOAT16 * (np.abs(lowest) + span)
    error = np.abs(np.asarray(decoded, np.float64).reshape(wide.shape) - wide).max(axis=-1)
    assert (error <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.140625, 1e30])
def test_a_constant_value_is_read_as_it_is_stored(bits, constant):
    values = jnp.full((1, 1, 16), constant)
    encoded, decoded = encode_values(QuantisedValues(bits), values)
    assert not encoded.codes.any()
    assert not encoded.scale.any()
    np.testing.assert_array_equal(decoded, values.astype(jnp.bfloat16).astype(jnp.float32))


def test_values_on_the_grid_are_exact():
    grid = -2.0 + 0.25 * np.arange(16)
    values = jnp.asarray(np.random.default_rng(0).permutation(grid), jnp.float32)[None, None]
    np.testing.assert_array_equal(encode_values(QuantisedValues(4), values)[1], values)


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_other_value_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"values of {bits} bits are not supported"):
        QuantisedValues(bits)


def test_groups_of_no_channels_are_refused():
    with pytest.raises(ValueError, match="groups of 0 channels must be positive"):
        QuantisedValues(4, group=0)


# Keys quantised per channel


@pytest.mark.parametrize("bits", [2, 4])
def test_a_channel_of_a_group_of_keys_is_quantised_as_one_value(bits):
    keys = random_keys(96).reshape(3, 32, 2, 64)
    channels_last = np.moveaxis(keys, 1, -1)
    encoded, decoded = encode_values(ChannelQuantisedKeys(bits), keys)
    values, expected = encode_values(QuantisedValues(bits), channels_last)
    np.testing.assert_array_equal(np.moveaxis(encoded.codes, 1, -1), values.codes)
    np.testing.assert_array_equal(encoded.scale, values.scale[..., 0])
    np.testing.assert_array_equal(encoded.zero, values.zero[..., 0])
    np.testing.assert_array_equal(np.moveaxis(decoded, 1, -1), expected)


@pytest.mark.parametrize("group", [32, 64])
def test_quantised_keys_are_scored_wherever_their_block_begins(group):
    codec, layers, batch, tokens, head_dim = ChannelQuantisedKeys(4, group), 2, 3, 512, 16
    keys = random_keys(layers * batch * tokens, head_dim=head_dim)
    keys = keys.reshape(layers, batch, tokens // group, group, 2, head_dim)
    query = random_keys(batch * 5, kv_heads=4, head_dim=head_dim).reshape(batch, 5, 4, head_dim)
    encoded = codec.encode(jnp.asarray(keys))
    words = rearrange(pack_column(encoded.codes, 4), "l b g n k w -> l b (k w) (g n)")
    scalars = jnp.moveaxis(encoded.scalars, 2, 3)
    score = channel_scores(codec, words, scalars, jnp.int32(1), jnp.asarray(query))
    first, last = 128, 384
    decoded = np.asarray(codec.decode(encoded), np.float64).reshape(layers, batch, tokens, 2, -1)
    expected = np.einsum(
        "bqkgd,btkd->bkgqt", query.reshape(batch, 5, 2, 2, -1), decoded[1, :, first:last]
    )
    actual = score(jnp.int32(first), last - first)
    np.testing.assert_allclose(actual, expected / head_dim**0.5, atol=1e-5)


def test_other_widths_and_groups_of_keys_are_refused():
    with pytest.raises(ValueError, match="keys of 3 bits are not supported; use 4 or 2"):
        ChannelQuantisedKeys(3)
    for group in (0, 48, 256):
        with pytest.raises(ValueError, match=f"groups of {group} keys must divide 128 tokens"):
            ChannelQuantisedKeys(2, group)


def test_value_rotations_are_orthogonal_and_differ_by_layer_and_head():
    rotation = np.asarray(random_rotation(jax.random.key(0), 2, 3, 16))
    product = np.einsum("lkcd,lked->lkce", rotation, rotation)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(16), product.shape), atol=1e-5)
    flat = rotation.reshape(6, -1)
    assert all(np.abs(flat[i] - flat[j]).max() > 0.1 for i in range(6) for j in range(i))
