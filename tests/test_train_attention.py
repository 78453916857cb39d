"""Compressed attention with a gradient: the same output as a cache's, and the right gradient."""

import itertools
from dataclasses import replace
from functools import cache as cached
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import random_parameters, small_config
from test_agreement import (
    LENGTHS,
    SPECS,
    assert_agree,
    codec_for,
    dense,
    frequencies_for,
    sequence,
)

from h1bjax import merged_attention as merged_module
from h1bjax.cache import (
    choose_training,
    dense_attention,
    training_attention,
)
from h1bjax.cache.straight_through import (
    SketchedKeys,
    signed_queries,
    straight_through,
    surrogate_sketch,
    with_surrogate,
)
from h1bjax.decoder import Decoder, init_codec
from h1bjax.fused_attention import Choice
from h1bjax.merged_attention import Part, merged_attention
from h1bjax.rope import rope_frequencies

pytestmark = pytest.mark.once

TOKENS, BEGIN, WINDOW = 23, 7, 5
CODECS = ("h1b", "h1b-unscaled", "h1b-signs", "h1b-2plane", "h1b-paper")
DECODED = ("h1b-unscaled", "h1b-2plane-v2", "linear, period 32, fitted")


def slow(*names: str, among: tuple[str, ...]):
    """Cases for `pytest.mark.parametrize`, of which some take time and show little more."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in names else []) for name in among]


# Parts that merge


def rows():
    """Queries, keys and values of two kinds, a shift, and a direction to differentiate along."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)

    exact = draw(TOKENS, 4, 8), draw(TOKENS, 2, 8), draw(TOKENS, 2, 6)
    coded = draw(TOKENS, 4, 16), draw(TOKENS, 2, 16), draw(TOKENS, 2, 6)
    return (exact, coded, draw(TOKENS, 4)), draw(TOKENS, 4, 6)


def in_parts(inputs, implementation="xla"):
    """The latest tokens are read exactly, those before them coded."""
    (query, keys, values), (coded_query, coded_keys, coded_values), shift = inputs
    stored = slice(BEGIN - WINDOW, TOKENS - WINDOW)
    return [
        Part(query, keys, values, scale=0.3, window=WINDOW, implementation=implementation),
        Part(
            query[:, WINDOW:], keys[:, : BEGIN - WINDOW], values[:, : BEGIN - WINDOW], begin=WINDOW
        ),
        Part(
            coded_query[:, BEGIN:],
            coded_keys[:, stored],
            coded_values[:, stored],
            shift=shift[:, BEGIN:],
            scale=0.2,
            begin=BEGIN,
            implementation=implementation,
        ),
    ]


def at_once(inputs):
    """The same with all logits side by side in one softmax, for JAX to differentiate."""
    (query, keys, values), (coded_query, coded_keys, coded_values), shift = inputs
    t, n = jnp.arange(TOKENS)[:, None], jnp.arange(TOKENS)

    def logits(query, keys):
        return jnp.einsum("bthd,bnhd->bhtn", query, jnp.repeat(keys, 2, axis=2))

    recent, old = (n <= t) & (n > t - WINDOW), n <= t - WINDOW
    readings = [
        (0.3 * logits(query, keys), recent),
        (logits(query, keys), old & (n < BEGIN - WINDOW)),
        (
            0.2 * logits(coded_query, coded_keys) + jnp.moveaxis(shift, 2, 1)[..., None],
            old & (n >= BEGIN - WINDOW),
        ),
    ]
    side_by_side = jnp.concatenate([jnp.where(seen, x, -jnp.inf) for x, seen in readings], -1)
    read = jnp.concatenate([values, values, coded_values], axis=1)
    weights = jax.nn.softmax(side_by_side, axis=-1)
    return jnp.einsum("bhtn,bnhd->bthd", weights, jnp.repeat(read, 2, axis=2))


def with_gradient(attend):
    inputs, direction = rows()
    compiled = jax.jit(jax.value_and_grad(lambda inputs: jnp.sum(direction * attend(inputs))))
    return compiled(inputs)


@cached
def expected_gradient():
    return with_gradient(at_once)


def merged(inputs, **options):
    return merged_attention(in_parts(inputs, **options))


def test_merged_parts_have_the_gradient_of_one_softmax():
    for found, expected in zip(
        jax.tree.leaves(with_gradient(merged)), jax.tree.leaves(expected_gradient()), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_recomputing_changes_no_gradient():
    again = with_gradient(jax.checkpoint(merged))
    for found, expected in zip(
        jax.tree.leaves(again), jax.tree.leaves(expected_gradient()), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_cudnn_is_given_the_log_sum_exp_and_output_of_the_whole(monkeypatch):
    """With a stand-in of the same structure: flash attention with its own backward pass."""

    @partial(jax.custom_vjp, nondiff_argnums=(3, 4))
    def flash(query, keys, values, scale, window):
        return forward(query, keys, values, scale, window)[0]

    def forward(query, keys, values, scale, window):
        part = Part(query, keys, values, scale=scale, window=window)
        output, lse = merged_module._partial(part)
        return output, (query, keys, values, jnp.moveaxis(lse, 2, 1), output)

    def backward(scale, window, saved, gradient):
        query, keys, values, lse, output = saved
        part = Part(query, keys, values, scale=scale, window=window)
        return merged_module._xla_gradients(part, jnp.moveaxis(lse, 1, 2), output, gradient)

    flash.defvjp(forward, backward)

    def dot_product_attention(
        query, keys, values, *, is_causal, scale, local_window_size, implementation
    ):
        assert is_causal
        assert implementation == "cudnn"
        window = None if local_window_size is None else local_window_size[0] + 1
        return flash(query, keys, values, scale, window)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    found = with_gradient(partial(merged, implementation="cudnn"))
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected_gradient()), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_another_structure_of_cudnns_backward_pass_is_refused(monkeypatch):
    def plain(query, keys, values, **_):
        return jnp.sum(keys) * jnp.sum(values) * query

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    with pytest.raises(NotImplementedError, match="keeps other things"):
        with_gradient(partial(merged, implementation="cudnn"))


def test_parts_of_other_rows_are_refused():
    inputs, _ = rows()
    parts = in_parts(inputs)
    with pytest.raises(ValueError, match="must begin with the first token"):
        merged_attention(parts[1:])
    with pytest.raises(ValueError, match=r"different tokens: \[23, 18\]"):
        merged_attention([parts[0], Part(parts[0].query[:, WINDOW:], *inputs[0][1:])])


# Codes with a surrogate


@pytest.mark.parametrize("name", slow("h1b-unscaled", "h1b-signs", among=CODECS))
def test_the_gradient_of_codes_is_that_of_their_surrogate(name):
    codec, parameters = SPECS[name].sketch, codec_for(SPECS[name])
    assert codec is not None
    encoder, rng = codec.encoder(parameters), np.random.default_rng(1)
    keys = jnp.asarray(rng.normal(size=(40, 2, 32)), jnp.float32)
    encoded = codec.encode(parameters, keys)
    codes = SketchedKeys(encoded.signs, encoded.scale)
    directions = jax.tree.map(
        lambda code: jnp.asarray(rng.normal(size=code.shape), jnp.float32), codes
    )

    def along(sketched):
        return sum(jax.tree.leaves(jax.tree.map(lambda *x: jnp.vdot(*x), directions, sketched)))

    def moved(changed):
        return replace(encoder, projection=changed["projection"], mean=changed["mean"])

    @jax.jit
    def hard(changed):
        return along(with_surrogate(moved(changed), changed["keys"], codes))

    start = surrogate_sketch(encoder, keys, codes.signs).signs

    @jax.jit
    def soft(changed):
        signs = codes.signs
        if encoder.metric is not None:
            # This scalar follows the signs, which move as their surrogates do.
            signs = signs + surrogate_sketch(moved(changed), changed["keys"], signs).signs - start
        return along(surrogate_sketch(moved(changed), changed["keys"], signs))

    for found, code in zip(with_surrogate(encoder, keys, codes), codes, strict=True):
        np.testing.assert_array_equal(found, code)
    point = {"keys": keys, "projection": encoder.projection, "mean": encoder.mean}
    gradient = jax.grad(hard)(point)
    for name, seed in itertools.product(point, range(3)):
        step = np.random.default_rng(seed).normal(size=point[name].shape).astype(np.float32)
        step *= np.float32(np.std(point[name]) or 1.0)
        # So short that few coordinates pass the end of their quantiser on the way.
        ahead, behind = (
            float(soft(point | {name: point[name] + amount * step})) for amount in (5e-4, -5e-4)
        )
        slope = float(jnp.sum(gradient[name] * step))
        assert slope == pytest.approx((ahead - behind) / 1e-3, rel=0.03, abs=0.3), name


def test_a_signed_query_has_the_gradient_of_its_surrogate():
    rng = np.random.default_rng(3)
    query = rng.normal(size=(1, 5, 4, 32)).astype(np.float32)
    projection = rng.normal(size=(2, 32, 64)).astype(np.float32)

    def surrogate(query, projection):
        """In float64; a sign is its own input in steps of `2·Σu²/Σ|u|`, cut off at one."""
        u = np.einsum("btkgd,kdc->btkgc", query.reshape(1, 5, 2, 2, 32), projection)
        step = 2 * np.sum(u * u, axis=-1) / np.sum(np.abs(u), axis=-1)
        return 2 * np.clip(u / step[..., None], -1, 1).reshape(1, 5, 4, 64)

    signs = jnp.where(surrogate(query, projection) >= 0, 1.0, -1.0)
    direction = rng.normal(size=signs.shape)

    def along(query, projection):
        found = signed_queries(query, projection, signs)
        return jnp.sum(found * direction), found

    gradients, found = jax.grad(along, (0, 1), has_aux=True)(query, jnp.asarray(projection))
    np.testing.assert_array_equal(found, signs)
    point = [query.astype(np.float64), projection.astype(np.float64)]
    for index, gradient in enumerate(gradients):
        step = rng.normal(size=point[index].shape)

        def shifted(amount, index=index, step=step):
            place = [x + amount * step if n == index else x for n, x in enumerate(point)]
            return np.sum(direction * surrogate(*place))

        slope = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        assert np.sum(gradient * step) == pytest.approx(slope, rel=1e-3, abs=1e-2)


def test_a_sketch_that_rounds_nothing_off_moves_as_its_key_does():
    codec, parameters = SPECS["h1b-signs"].sketch, codec_for(SPECS["h1b-signs"])
    assert codec is not None
    encoder, transform = codec.encoder(parameters), codec.query_transform(parameters)
    keys = jnp.asarray(np.random.default_rng(2).normal(size=(30, 2, 32)), jnp.float32)
    soft = surrogate_sketch(encoder, keys, codec.encode(parameters, keys).signs)
    assert soft.scale is not None
    decoded = jnp.einsum("nkc,kdc->nkd", soft.signs * soft.scale[..., None], transform)
    centred = keys - parameters.mean[...]
    # But for the few coordinates more than twice the typical one, which are cut off.
    error = np.linalg.norm(decoded - centred, axis=-1) / np.linalg.norm(centred, axis=-1)
    assert np.median(error) < 1e-5
    assert error.max() < 0.5


def test_straight_through_is_one_thing_with_the_gradient_of_another():
    x = jnp.array([0.3, -2.0])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(straight_through(jnp.sign(x), x**2)))(x)
    assert value == 0
    np.testing.assert_allclose(gradient, 2 * x)


# Whole rows


# The parts that attend are those of a prompt, whose tests know more caches.
ROWS = (
    *("exact", "h1b", "h1b-signs", "h1b-2plane-v2", "h1b-paper", "kivi-2", "no window"),
    *("linear, period 32, fitted", "sinks-window", "exact keys", "exact values", "paper, raw"),
)


def full_rows():
    return jnp.arange(max(LENGTHS), dtype=jnp.int32)[None]


@pytest.mark.parametrize("name", slow(*ROWS[6:], "exact", "h1b-signs", among=ROWS))
def test_outputs_are_the_dense_form(name):
    spec = SPECS.get(name, SPECS["paper, fitted"].replace(name=name, scores="raw"))
    tokens, _ = sequence(spec)
    attend = jax.jit(training_attention, static_argnums=0)
    output = attend(spec, *tokens, full_rows(), codec_for(spec), frequencies_for(spec))
    for row, length in enumerate(LENGTHS):
        assert_agree(output[row, :length], dense(spec)[row, :length])


@pytest.mark.parametrize("name", slow(*DECODED[1:], among=DECODED))
def test_what_codes_do_not_depend_on_has_the_gradient_of_the_dense_form(name):
    """Queries, and of the codec's parameters the decoder, the temperature and the offset."""
    spec = SPECS[name]
    (query, keys, values), _ = sequence(spec)
    direction = jnp.asarray(np.random.default_rng(4).normal(size=query.shape), jnp.float32)
    frequencies = frequencies_for(spec)

    def gradient(attend, positions):
        def along(query, codec):
            output = attend(spec, query, keys, values, positions, codec, frequencies)
            return jnp.sum(direction * output)

        return jax.jit(jax.grad(along, (0, 1)))(jnp.asarray(query), codec_for(spec))

    found, found_codec = gradient(training_attention, full_rows())
    expected, expected_codec = gradient(
        dense_attention, jnp.broadcast_to(full_rows(), query.shape[:2])
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    scaled = spec.sketch is not None and spec.sketch.scaled
    names = ["temperature", "offset", *(["transform"] if not scaled else [])]
    for name in names:
        one, other = (getattr(codec, name)[...] for codec in (found_codec, expected_codec))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3, err_msg=name)
    # That of the keys is another: there, the codes move.
    assert np.any(np.asarray(found_codec.projection[...]))


@pytest.mark.parametrize("name", slow("kivi-2", among=("h1b", "kivi-2")))
def test_keys_and_values_get_the_gradient_of_exact_attention_but_for_the_rounding(name):
    spec = SPECS[name]
    tokens, _ = sequence(spec)
    direction = jnp.asarray(np.random.default_rng(4).normal(size=tokens[0].shape), jnp.float32)

    def gradient(spec):
        def along(query, keys, values):
            codec = codec_for(SPECS[name])
            rest = full_rows(), codec, frequencies_for(spec)
            return jnp.sum(direction * training_attention(spec, query, keys, values, *rest))

        return jax.jit(jax.grad(along, (1, 2)))(*map(jnp.asarray, tokens))

    for found, exact in zip(gradient(spec), gradient(SPECS["exact"]), strict=True):
        similarity = np.vdot(found, exact) / (np.linalg.norm(found) * np.linalg.norm(exact))
        assert similarity > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["h1b", "h1b-2plane-v2", "h1b-unscaled-p32", "h1b-paper"])
def test_fused_attention_has_the_gradient_of_the_plain_one(name, monkeypatch):
    from h1bjax.cache import training

    spec, rng = SPECS[name], np.random.default_rng(0)
    config = small_config(head_dim=128, num_heads=4, num_kv_heads=2)
    codec = jax.tree.map(lambda x: x[0], init_codec(config, spec, jax.random.key(0)))
    tokens = [
        jnp.asarray(rng.normal(size=(2, 300, heads, 128)), jnp.bfloat16) for heads in (4, 2, 2)
    ]
    direction = jnp.asarray(rng.normal(size=tokens[0].shape), jnp.float32)
    rest = jnp.arange(300, dtype=jnp.int32)[None], codec, jnp.asarray(rope_frequencies(config))

    def along(query, keys, values):
        return jnp.sum(direction * training_attention(spec, query, keys, values, *rest))

    assert choose_training(spec, jnp.bfloat16, 128).implementation == "cudnn"
    found = jax.jit(jax.value_and_grad(along, (0, 1, 2)))(*tokens)
    monkeypatch.setattr(training, "choose_training", lambda *_: Choice("xla", "asked for"))
    jax.clear_caches()
    expected = jax.jit(jax.value_and_grad(along, (0, 1, 2)))(*tokens)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)


def test_says_why_attention_is_not_fused_on_a_cpu():
    choice = choose_training(SPECS["h1b"], jnp.bfloat16, 128)
    assert choice.implementation == "xla"
    assert "no NVIDIA GPU" in choice.reason


# A whole decoder


def test_a_decoder_without_positions_trains_what_it_prefills():
    config, spec = small_config(), SPECS["h1b"]
    codec = init_codec(config, spec, jax.random.key(2))
    tokens = jax.random.randint(jax.random.key(1), (2, 80), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(80, dtype=jnp.int32), tokens.shape)

    @jax.jit
    def losses(parameters):
        decoder = Decoder(config, parameters, spec, codec)
        prefilled, _ = decoder(tokens, positions, decoder.init_cache(batch=2, max_length=80))

        def trained(parameters):
            decoder = Decoder(config, parameters, spec, codec)
            logits, _ = decoder(tokens, None, compressed=True, remat=True)
            return jnp.mean(jnp.square(logits)), logits

        (_, logits), gradient = jax.value_and_grad(trained, has_aux=True)(parameters)
        return prefilled, logits, gradient

    prefilled, logits, gradient = losses(random_parameters(config))
    error = np.abs(np.asarray(logits - prefilled)).max(axis=-1)
    # A sign may flip where layers before it differ in their last bits.
    assert np.median(error) < 1e-4
    assert error.max() < 0.1
    assert all(np.any(np.asarray(array)) for array in gradient.values())
    assert all(np.isfinite(array).all() for array in gradient.values())
