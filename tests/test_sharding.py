"""Decoding on a mesh of virtual devices gives what one device gives."""

import itertools
import re
import runpy
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrations import random_calibration
from toy import toy_config, toy_parameters

from h1bjax.cache import PRESETS, CacheSpec, KVCache
from h1bjax.cache.sequence_shard import SequenceShard
from h1bjax.decoder import Decoder, fold_value_rotation
from h1bjax.generate import decode
from h1bjax.model import Model
from h1bjax.parameters import decoder_parameters
from h1bjax.sharding import AXES, check_mesh, make_mesh, parameter_sharding

pytestmark = pytest.mark.once

CONFIG = toy_config(max_position_embeddings=4096)
PROMPTS = [
    np.random.default_rng(row).integers(3, CONFIG.vocab_size, length).tolist()
    for row, length in enumerate((300, 5, 130))
]
NEW = 24


def mesh_of(*sizes):
    count = int(np.prod(sizes))
    return make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[:count])


def model(preset, mesh=None):
    """The toy model with random calibration; float32."""
    spec = CacheSpec.preset(preset)
    calibration = random_calibration(spec, config=CONFIG)
    parameters = toy_parameters(CONFIG)
    if mesh is not None:
        rule = parameter_sharding(mesh, CONFIG)
        parameters = {
            name: jax.device_put(array, rule((None, *info.axes) if info.stacked else info.axes))
            for (name, info), array in zip(
                decoder_parameters(CONFIG).items(), parameters.values(), strict=True
            )
        }
    if calibration.rotation is not None:
        parameters = fold_value_rotation(CONFIG, parameters, calibration.rotation)
    return Model(Decoder(CONFIG, parameters, spec, calibration.codec, mesh), None)


@cache
def expected(preset):
    out = model(preset).generate(PROMPTS, max_new_tokens=NEW)
    assert len(set(itertools.chain(*out.tokens))) > NEW // 2, "the toy model repeats itself"
    return out.tokens


def check(preset, sizes):
    before = decode.compiled._cache_size()
    tokens = model(preset, mesh_of(*sizes)).generate(PROMPTS, max_new_tokens=NEW).tokens
    # Once, before the clock: the first state lies on the mesh as later ones do.
    assert decode.compiled._cache_size() <= before + 1
    assert tokens == expected(preset)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 1, 8)], ids=str)
def test_every_axis_gives_the_same_tokens(sizes):
    check("h1b-p32-v2", sizes)


@pytest.mark.parametrize("preset", [pytest.param("exact", marks=pytest.mark.slow), "h1b"])
def test_every_kind_of_cache_gives_the_same_tokens(preset):
    check(preset, (2, 2, 2))


EVERY_SHAPE = [
    sizes for sizes in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4, 8)) if np.prod(sizes) <= 8
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", EVERY_SHAPE, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_everything_gives_the_same_tokens(preset, sizes):
    check(preset, sizes)


def test_each_device_holds_its_part_of_the_cache_and_the_weights():
    decoder = model("h1b", mesh_of(2, 2, 2)).decoder
    held = decoder.init_cache(batch=4, max_length=1000)
    whole = KVCache.init(CONFIG, decoder.spec, batch=4, max_length=1024, dtype=jnp.float32)
    for name in ("key_words", "key_scales", "value_words", "value_affine"):
        array = getattr(held, name)
        assert array.nbytes == getattr(whole, name).nbytes
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // 8}
    window = held.window_keys
    assert {shard.data.nbytes for shard in window.addressable_shards} == {window.nbytes // 4}
    parts = {"key": 2, "value": 2, "query": 4, "output": 4, "gate": 4, "up": 4, "down": 4}
    for name, count in parts.items():
        array = getattr(decoder.layers, name)[...]
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // count}


@pytest.mark.slow
def test_a_conversation_goes_on_in_the_same_cache():
    turns = [PROMPTS, [[7] * 40, [8] * 200, [9]]]
    alone, spread = model("h1b"), model("h1b", mesh_of(2, 2, 2))
    outputs = []
    for one in (alone, spread):
        first = one.generate(turns[0], max_new_tokens=NEW)
        outputs.append(one.generate(turns[1], max_new_tokens=NEW, cache=first.cache).tokens)
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_a_cache_of_more_rows_than_prompts_is_refused():
    spread = model("exact", mesh_of(2, 1, 1))
    held = spread.generate(PROMPTS, max_new_tokens=2).cache
    with pytest.raises(ValueError, match="1 prompts for a cache of"):
        spread.generate([[5]], max_new_tokens=2, cache=held)


@pytest.mark.slow
def test_a_stream_has_only_the_rows_that_were_asked_for():
    steps = list(model("exact", mesh_of(2, 1, 1)).stream([[5, 6, 7]], max_new_tokens=3))
    assert [len(step.tokens) for step in steps] == [1, 1, 1]


def test_the_pmap_example_gives_the_same_tokens():
    path = Path(__file__).parents[1] / "examples" / "pmap_decoding.py"
    generate = runpy.run_path(str(path))["generate"]
    found = generate(model("h1b").decoder, PROMPTS, NEW)
    for tokens, wanted in zip(found, expected("h1b"), strict=True):
        assert tokens[: len(wanted)] == wanted


# Which token lies where


@pytest.mark.parametrize(("block", "count"), [(128, 2), (32, 4), (64, 3)])
def test_shards_divide_the_tokens_and_keep_their_order(block, count):
    length = 5 * block * count // 2 + 7
    position = jnp.arange(-1, length)
    found = []
    for index in range(count):
        shard = SequenceShard("sequence", jnp.int32(index), count, block)
        place = np.asarray(shard.place(position))
        assert place[0] == -1, "padding is stored nowhere"
        own = np.flatnonzero(place >= 0)
        np.testing.assert_array_equal(place[own], np.arange(len(own)))
        found.append(own)
        for stop in (-3, 0, 1, block, block * count + 1, length):
            before = int(np.sum(np.asarray(position)[own] < stop))
            assert int(shard.stop(jnp.int32(stop))) == before
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(1, length + 1))


# What a mesh may be


def test_a_mesh_can_be_written_as_text():
    mesh = make_mesh("tensor=2, batch=4", jax.devices()[:8])
    assert dict(mesh.shape) == {"batch": 4, "tensor": 2, "sequence": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("tensor", "a mesh is written like batch=2,tensor=4"),
        ("tensor=2,tensor=2", "each axis once"),
        ("model=2", "a mesh has the axes batch, tensor, sequence, not model"),
        ("tensor=0", "must be positive"),
        ("tensor=2", "a mesh of batch=1, tensor=2, sequence=1 has 2 devices, and there are 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(sizes, jax.devices()[:8])


def test_heads_that_cannot_be_divided_are_refused_with_a_plan():
    with pytest.raises(ValueError, match="tensor=4 does not divide the model's 2 KV heads; use t"):
        check_mesh(mesh_of(1, 4, 1), CONFIG)
    other = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="make it with make_mesh"):
        check_mesh(other, CONFIG)


def test_a_vocabulary_that_cannot_be_divided_is_replicated():
    rule = parameter_sharding(mesh_of(1, 2, 2), toy_config(vocab_size=301, intermediate_size=50))

    def part(axes, *shape):
        return rule(axes).shard_shape(shape)

    assert part(("vocab", "embed"), 301, 32) == (301, 32)
    assert part((None, "embed", "mlp"), 2, 32, 50) == (2, 32, 25)
    assert part(("heads", "head_dim", "embed"), 4, 32, 32) == (1, 32, 32)
