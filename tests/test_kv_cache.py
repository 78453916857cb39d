import dataclasses
from functools import cache as cached
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import random_parameters, small_config

from h1bjax.cache import (
    PRESETS,
    CacheSpec,
    ChannelQuantisedKeys,
    KVCache,
    OrthogonalSigns,
    QuantisedValues,
    append_and_attend,
)
from h1bjax.decoder import Decoder, init_codec
from h1bjax.rope import rope_frequencies

CONFIG = small_config()
FREQUENCIES = jnp.asarray(rope_frequencies(CONFIG))
SMALL_WINDOW = CacheSpec(
    "small window", OrthogonalSigns(), QuantisedValues(4), sinks=3, window=5, scores="corrected"
)
SPECS = [
    PRESETS["exact"],
    PRESETS["h1b-paper"],
    SMALL_WINDOW,
    CacheSpec("3-bit values of exact keys", values=QuantisedValues(3), window=4),
    CacheSpec("groups", ChannelQuantisedKeys(2), QuantisedValues(2, group=8), sinks=3, window=35),
    CacheSpec("window alone", sinks=3, window=5, evict=True),
]
named = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
# These take long, and show the same as others.
RARE = {"3-bit values of exact keys", "h1b-paper", "window alone"}
few = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.slow if s.name in RARE else (), id=s.name) for s in SPECS],
)
append_chunk = jax.jit(append_and_attend)


def init(spec: CacheSpec, *, batch: int = 2, max_length: int = 128, **changes) -> KVCache:
    config = dataclasses.replace(CONFIG, **changes)
    return KVCache.init(config, spec, batch=batch, max_length=max_length, dtype=jnp.float32)


@cached
def codec_of(spec: CacheSpec):
    codec = init_codec(CONFIG, spec, jax.random.key(0))
    return jax.tree.map(lambda array: array[1], codec)


def random_tokens(batch: int, tokens: int, seed: int = 0):
    """Queries, keys and values."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.normal(size=(batch, tokens, heads, CONFIG.head_dim)).astype(np.float32)
        for heads in (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads)
    )


def attend(cache, spec, tokens, positions):
    """Appends to layer 1; the output and the cache with the new lengths."""
    positions = jnp.asarray(positions, jnp.int32)
    output, cache = append_chunk(
        cache, jnp.int32(1), *tokens, positions, codec_of(spec), FREQUENCIES
    )
    return output, cache.advance(positions)


def arrays(cache: KVCache) -> dict[str, np.ndarray]:
    """Every array of a cache but its lengths."""
    return {
        field.name: np.asarray(value)
        for field in dataclasses.fields(cache)
        if field.name != "lengths" and isinstance(value := getattr(cache, field.name), jax.Array)
    }


def written_columns(spec: CacheSpec, before: KVCache, after: KVCache) -> dict[str, np.ndarray]:
    """For each array, `[layers, batch, tokens or slots]`: whether anything changed there."""
    changed = {}
    for name, old in arrays(before).items():
        different = old != arrays(after)[name]
        if name == "key_scales":
            layers, batch, rows, half = different.shape
            blocks = different.reshape(layers, batch, rows // 2, 2, half // 64, 64)
            different = blocks.swapaxes(3, 4).reshape(layers, batch, rows // 2, 2 * half)
        tokens_first = name in ("keys", "values", "window_keys", "window_values")
        changed[name] = different.any(axis=3 if tokens_first else 2)
    return changed


def filled(spec: CacheSpec, seed: int = 5, **sizes) -> KVCache:
    """A cache in which every bit pattern is random, so that any write shows."""
    rng = np.random.default_rng(seed)
    cache = init(spec, **sizes)

    def noise(array):
        if jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=array.shape), array.dtype)
        return jnp.asarray(rng.integers(0, 2**15, array.shape), array.dtype)

    return dataclasses.replace(jax.tree.map(noise, cache), lengths=cache.lengths)


def places(spec: CacheSpec, name: str, first: int, last: int) -> set[int]:
    """Where an array changes when tokens `first <= n < last` are appended to a row."""
    if name.startswith("window"):
        return {spec.sinks + (n - spec.sinks) % spec.window for n in range(first, last)}
    if isinstance(spec.keys, ChannelQuantisedKeys) and name.startswith("key"):
        completed = range(first // 32, last // 32)
        if name == "key_groups":
            return set(completed)
        return {32 * group + n for group in completed for n in range(32)}
    return set(range(first, last))


# Appending


@pytest.mark.once
@named
def test_a_chunk_is_written_at_its_positions_and_nowhere_else(spec):
    cache = filled(spec, batch=3)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([70, 61, 0], jnp.int32))
    positions = np.asarray([[70, 71, 72, -1], [61, 62, 63, 64], [-1, -1, -1, -1]])
    _, after = attend(cache, spec, random_tokens(3, 4), positions)

    assert after.lengths.tolist() == [73, 65, 0]
    for name, changed in written_columns(spec, cache, after).items():
        assert not changed[0].any(), f"{name} of the other layer"
        for row, (first, last) in enumerate(((70, 73), (61, 65), (0, 0))):
            slots = places(spec, name, first, last)
            assert set(np.flatnonzero(changed[1, row])) == slots, f"{name} of row {row}"


@named
def test_padding_is_never_written(spec):
    cache = filled(spec)
    _, after = attend(cache, spec, random_tokens(2, 3), np.full((2, 3), -1))
    for name, array in arrays(cache).items():
        np.testing.assert_array_equal(arrays(after)[name], array)
    assert after.lengths.tolist() == [0, 0]


@pytest.mark.once
@few
def test_what_padding_contains_does_not_matter(spec):
    tokens = random_tokens(2, 4)
    positions = np.asarray([[0, 1, -1, -1], [0, 1, 2, -1]])
    changed = tuple(np.where(positions[..., None, None] < 0, 1e3, x) for x in tokens)
    changed = tuple(x.astype(np.float32) for x in changed)
    cache = init(spec)
    first, second = (attend(cache, spec, x, positions) for x in (tokens, changed))
    np.testing.assert_array_equal(first[0], second[0])
    for name, array in arrays(first[1]).items():
        np.testing.assert_array_equal(arrays(second[1])[name], array)


@named
def test_the_last_column_can_be_written_and_nothing_beyond(spec):
    cache = filled(spec, batch=1)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([127], jnp.int32))
    _, after = attend(cache, spec, random_tokens(1, 1), [[127]])
    for name, changed in written_columns(spec, cache, after).items():
        assert set(np.flatnonzero(changed[1, 0])) == places(spec, name, 127, 128), name
    _, beyond = attend(after, spec, random_tokens(1, 1), [[128]])
    for name, array in arrays(after).items():
        if not name.startswith("window"):
            np.testing.assert_array_equal(arrays(beyond)[name], array)


# The window


@jax.jit
def append_alone(cache, keys, values, positions, codec):
    query = jnp.zeros((*positions.shape, CONFIG.num_heads, CONFIG.head_dim))
    _, cache = append_and_attend(
        cache, jnp.int32(1), query, keys, values, positions, codec, FREQUENCIES
    )
    return cache.advance(positions)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=2, max_size=2),
    seed=st.integers(0, 2**32 - 1),
    longest=st.sampled_from((1, 4, 17)),
)
@pytest.mark.parametrize(("sinks", "window"), [(3, 5), (0, 4), (2, 1)])
def test_the_window_holds_the_first_and_the_latest_tokens(sinks, window, lengths, seed, longest):
    spec = SMALL_WINDOW.replace(sinks=sinks, window=window)
    rng = np.random.default_rng(seed)
    _, keys, values = random_tokens(2, 30)
    cache = init(spec)
    done, rows, index = np.zeros(2, int), np.arange(2)[:, None], np.arange(17)
    while (done < lengths).any():
        count = np.minimum(rng.integers(0, longest + 1, 2), lengths - done)
        positions = np.where(index < count[:, None], done[:, None] + index, -1).astype(np.int32)
        chunk = keys[rows, positions], values[rows, positions]
        cache = append_alone(cache, *chunk, positions, codec_of(spec))
        done += count
    assert cache.lengths.tolist() == list(lengths)
    for row, length in enumerate(lengths):
        kept = {n: n for n in range(min(sinks, length))}
        kept |= {
            sinks + (n - sinks) % window: n for n in range(max(sinks, length - window), length)
        }
        for slot in range(sinks + window):
            for name, exact in (("window_keys", keys), ("window_values", values)):
                flat = exact[row, kept[slot]].reshape(-1) if slot in kept else np.zeros(64)
                stored = arrays(cache)[name][1, row, slot]
                np.testing.assert_array_equal(stored.view(jnp.bfloat16), flat.astype(jnp.bfloat16))


# Positions


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[2, 3], [0, 2]], r"row 1 holds 0 tokens, so its positions must be 0, 1, … .*\[0, 2\]"),
        ([[3, 4], [0, 1]], r"row 0 holds 2 tokens, so its positions must be 2, 3.*\[3, 4\]"),
        ([[1, 2], [0, 1]], r"row 0 holds 2 tokens"),
        ([[2, 3], [-1, 0]], r"row 1 holds 0 tokens, .* -1 for padding; got \[-1, 0\]"),
        ([[2, -2], [0, 1]], r"row 0 holds 2 tokens"),
        ([[2, 2], [0, 1]], r"row 0 holds 2 tokens"),
        ([[2, 3]], "1 rows of positions for a cache of 2"),
    ],
)
def test_positions_that_do_not_continue_their_row_are_refused(positions, message):
    cache = dataclasses.replace(init(SMALL_WINDOW), lengths=jnp.asarray([2, 0], jnp.int32))
    with pytest.raises(ValueError, match=message):
        cache.check(jnp.asarray(positions, jnp.int32))


def test_positions_that_continue_their_row_are_accepted():
    cache = dataclasses.replace(init(SMALL_WINDOW), lengths=jnp.asarray([2, 126], jnp.int32))
    for positions in ([[2, 3], [126, 127]], [[2, -1], [-1, -1]], [[-1, -1], [126, -1]]):
        cache.check(jnp.asarray(positions, jnp.int32))


def test_a_full_row_says_how_to_go_on():
    cache = dataclasses.replace(init(SMALL_WINDOW), lengths=jnp.asarray([2, 126], jnp.int32))
    message = "row 1 holds 126 of at most 128 tokens and cannot take 3 more; .* or grow it"
    with pytest.raises(ValueError, match=message):
        cache.check(jnp.asarray([[2, -1, -1], [126, 127, 128]]))


def test_the_sliding_window_limits_the_tokens_of_a_row():
    cache = init(SMALL_WINDOW, batch=1, max_length=100, sliding_window=100)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([99], jnp.int32))
    cache.check(jnp.asarray([[99]]))
    with pytest.raises(ValueError, match="holds 99 of at most 100 tokens"):
        cache.check(jnp.asarray([[99, 100]]))


@cached
def decoder(spec: CacheSpec) -> Decoder:
    return Decoder(
        CONFIG, random_parameters(CONFIG), spec, init_codec(CONFIG, spec, jax.random.key(1))
    )


def test_the_decoder_refuses_such_positions_when_they_are_concrete():
    model = decoder(SMALL_WINDOW)
    cache = model.init_cache(batch=2, max_length=8)
    tokens = jnp.zeros((2, 2), jnp.int32)
    with pytest.raises(ValueError, match="row 1 holds 0 tokens"):
        model(tokens, jnp.asarray([[0, 1], [1, 2]]), cache)
    with pytest.raises(ValueError, match="1 rows of positions for a cache of 2"):
        model(tokens[:1], jnp.asarray([[0, 1]]), cache)
    with pytest.raises(ValueError, match=r"tokens \(2, 2\) and positions \(2, 1\) must agree"):
        model(tokens, jnp.asarray([[0], [0]]), cache)


@jax.jit
def step(model, tokens, positions, cache):
    return model(tokens, positions, cache)


@pytest.mark.once
@pytest.mark.parametrize("spec", [PRESETS["exact"], SMALL_WINDOW], ids=lambda spec: spec.name)
def test_under_jit_a_refused_row_is_not_written_and_its_logits_are_nan(spec):
    model = decoder(spec)
    cache = model.init_cache(batch=4, max_length=128)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 2)), jnp.int32)
    start = jnp.asarray([[0, 1], [0, 1], [0, 1], [0, 1]])
    _, cache = step(model, tokens, start, cache)

    good = jnp.asarray([[2, 3], [2, -1], [2, 3], [2, 3]])
    bad = jnp.asarray([[2, 3], [2, -1], [3, 4], [127, 128]])
    expected, _ = step(model, tokens, good, cache)
    logits, after = step(model, tokens, bad, cache)

    assert np.isnan(logits[2:]).all()
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(logits[:2], expected[:2])
    assert after.lengths.tolist() == [4, 3, 2, 2]
    for name, array in arrays(after).items():
        np.testing.assert_array_equal(array[:, 2:], arrays(cache)[name][:, 2:])

    # A row whose tokens fit only in part is refused as a whole.
    full = dataclasses.replace(cache, lengths=jnp.asarray([127, 126, 0, 0], jnp.int32))
    logits, after = step(model, tokens, jnp.asarray([[127, 128], [126, 127], [0, 1], [0, 1]]), full)
    assert np.isnan(logits[0]).all()
    assert not np.isnan(logits[1:]).any()
    assert after.lengths.tolist() == [127, 128, 2, 2]
    for name, array in arrays(after).items():
        np.testing.assert_array_equal(array[:, 0], arrays(full)[name][:, 0])


# Growing


@pytest.mark.once
@few
def test_growing_keeps_everything_and_makes_room(spec):
    tokens, more = random_tokens(2, 120), random_tokens(2, 120, seed=1)
    positions = np.broadcast_to(np.arange(120), (2, 120))
    _, cache = attend(init(spec), spec, tokens, positions)
    _, roomy = attend(init(spec, max_length=300), spec, tokens, positions)

    grown = cache.grow(290)
    assert grown.capacity == grown.limit == 384
    assert grown.nbytes == spec.nbytes(CONFIG, batch=2, max_length=290, dtype=jnp.float32)
    assert grown.lengths.tolist() == [120, 120]
    for name, array in arrays(roomy).items():
        np.testing.assert_array_equal(arrays(grown)[name], array)

    later = np.broadcast_to(np.arange(120, 240), (2, 120))
    grown.check(jnp.asarray(later))
    output, _ = attend(grown, spec, more, later)
    expected, _ = attend(roomy, spec, more, later)
    np.testing.assert_array_equal(output, expected)


def test_growing_to_what_there_is_room_for_changes_nothing():
    cache = init(SMALL_WINDOW, max_length=200)
    assert cache.grow(256) is cache
    assert cache.grow(1) is cache


@pytest.mark.parametrize("max_length", [100, 200, 300])
def test_growing_stops_at_the_models_sliding_window(max_length):
    cache = init(SMALL_WINDOW, max_length=max_length, sliding_window=300)
    assert cache.grow(300).limit == 300
    assert cache.grow(300).capacity == 384
    with pytest.raises(
        ValueError, match="max_length=301 exceeds the model's sliding window of 300"
    ):
        cache.grow(301)


# The pytree


@named
def test_a_cache_is_a_pytree_that_keeps_its_description(spec):
    cache = init(spec)
    leaves, structure = jax.tree.flatten(cache)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.spec, again.capacity, again.batch) == (spec, 128, 2)
    assert hash(structure) == hash(jax.tree.structure(init(spec)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.lengths = cache.lengths + 1  # type: ignore[misc]


def test_a_cache_of_another_codec_is_refused_by_the_decoder():
    model = decoder(SMALL_WINDOW)
    cache = init(PRESETS["h1b-paper"])
    with pytest.raises(ValueError, match=r"stores keys as 'h1b-paper', .* codec of 'small window'"):
        model(jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32), cache)


@partial(jax.jit, donate_argnums=0)
def donating(cache, query, keys, values, positions, codec):
    _, cache = append_and_attend(
        cache, jnp.int32(0), query, keys, values, positions, codec, FREQUENCIES
    )
    return cache.advance(positions)


@named
def test_a_donated_cache_is_updated_where_it_lies(spec):
    cache = init(spec)
    places = {name: getattr(cache, name).unsafe_buffer_pointer() for name in arrays(cache)}
    tokens = random_tokens(2, 1)
    after = donating(cache, *tokens, jnp.zeros((2, 1), jnp.int32), codec_of(spec))
    for name, place in places.items():
        assert getattr(cache, name).is_deleted()
        assert getattr(after, name).unsafe_buffer_pointer() == place
