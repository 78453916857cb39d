import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpu
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_config, toy_parameters

from h1bjax.cache import CacheSpec, GaussianSigns, LinearCode, OrthogonalSigns, TwoPlanes
from h1bjax.decoder import Decoder, init_codec
from pallas_kernels.append import (
    ExactWindow,
    KeyEncoder,
    StoredTokens,
    Token,
    append_token,
    gpu_mosaic,
    reference,
)
from pallas_kernels.append.gpu_mosaic import block as gpu_block
from pallas_kernels.append.gpu_mosaic import places, products, sketch, value
from pallas_kernels.packing import unpack_rows, unpack_scalars, words_per_column
from pallas_kernels.sketch_attention import PackedKeys, PackedValues

pytestmark = pytest.mark.once

CODECS = {
    "gaussian": GaussianSigns(128),
    "signs": OrthogonalSigns(),
    "few signs": OrthogonalSigns(32),
    "two planes": TwoPlanes(),
    "linear": LinearCode(),
    "deep linear": LinearCode(rate=2.0),
    "unscaled": LinearCode(scaled=False),
}
LAYERS, LAYER, CAPACITY = 2, 1, 256
POSITIONS = (-1, 0, 3, 4, 63, 64, 127, 128, CAPACITY - 1, CAPACITY, CAPACITY + 5)


def encoder_of(codec, head_dim=64, kv_heads=2, seed=0):
    """A codec's encoder with a mean, and with a metric that is not the identity."""
    parameters = codec.init(jax.random.key(seed), LAYERS, kv_heads, kv_heads, head_dim)
    random = np.random.default_rng(seed)
    parameters.mean[...] = jnp.asarray(0.3 * random.standard_normal(parameters.mean.shape))
    if parameters.metric is not None:
        noise = random.standard_normal(parameters.metric.shape) / (4 * math.sqrt(head_dim))
        symmetric = noise + np.swapaxes(noise, -1, -2)
        parameters.metric[...] = parameters.metric[...] + jnp.asarray(symmetric)
    return codec.encoder(parameters), parameters


def inputs(
    encoder,
    *,
    positions=(5,),
    value_bits=4,
    window=True,
    relative=False,
    dtype=jnp.float32,
    seed=0,
):
    """A cache filled with random bits, and a token of each row."""
    random = np.random.default_rng(seed)
    layers, kv_heads, _, head_dim = encoder.projection.shape
    batch = len(positions)
    lead = (layers, batch)

    def words(*shape):
        return jnp.asarray(random.integers(-(2**31), 2**31, (*lead, *shape)), jnp.int32)

    def halves(*shape):
        return jnp.asarray(random.integers(0, 2**16, (*lead, *shape)), jnp.uint16)

    def vectors(dtype):
        return jnp.asarray(random.standard_normal((batch, kv_heads, head_dim)), dtype)

    value_rows = kv_heads * words_per_column(head_dim, value_bits)
    channels = (8, kv_heads * head_dim)
    stored = StoredTokens(
        PackedKeys(
            words(kv_heads * encoder.bits // 32, CAPACITY),
            halves(2 * kv_heads, CAPACITY // 2) if encoder.scaled else None,
        ),
        PackedValues(words(value_rows, CAPACITY), words(kv_heads, CAPACITY), value_bits),
        ExactWindow(halves(*channels), halves(*channels), sinks=3) if window else None,
    )
    token = Token(
        vectors(dtype),
        vectors(dtype),
        jnp.asarray(positions, jnp.int32),
        vectors(jnp.float32) if relative else None,
    )
    return stored, jnp.int32(LAYER), encoder, token


def run_blocks(stored, layer, encoder, token):
    """The kernel's own code, run block by block on NumPy arrays."""
    batch, kv_heads, _ = token.keys.shape
    written = gpu_mosaic.cache_arrays(stored)
    arrays = gpu_mosaic.operands(layer, encoder, token) | written
    block: Any = numpy_gpu.Block(32 * places.WARPS, places.Layout.of(encoder).nbytes)
    located = {
        name: places.GlobalArray(block.place(np.asarray(array)), array.shape, array.dtype)
        for name, array in arrays.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in (gpu_block, places, products, sketch, value):
            patch.setattr(module, "ptx", block)
            patch.setattr(module, "registers", block)
        for head in range(kv_heads):
            for group in range(-(-batch // places.ROWS)):
                gpu_block.append_block(
                    block.thread,
                    block.I32(0),
                    block.I32(head),
                    block.I32(group),
                    located,
                    encoder,
                    stored.values.bits,
                    0 if stored.window is None else stored.window.sinks,
                )
    found = {name: block.read_back(located[name].address, written[name]) for name in written}
    return gpu_mosaic.with_arrays(stored, jax.tree.map(jnp.asarray, found))


def columns(stored, kv_heads, bits, head_dim):
    """One layer's arrays as floats and codes: `[batch, kv_heads, …, tokens]`."""

    def by_head(words):
        return words[LAYER].reshape(words.shape[1], kv_heads, -1, words.shape[3])

    found = {
        "signs": unpack_rows(by_head(stored.keys.words), 1, bits),
        "codes": unpack_rows(by_head(stored.values.words), stored.values.bits, head_dim),
    }
    if stored.keys.scales is not None:
        found["scales"] = unpack_scalars(stored.keys.scales[LAYER])
    return {name: np.asarray(array) for name, array in found.items()}


def assert_same(found, expected, encoder, token):
    """Equal but for what another order of summation explains."""
    kv_heads, head_dim = token.keys.shape[1:]
    ours, theirs = (columns(x, kv_heads, encoder.bits, head_dim) for x in (found, expected))
    flipped = ours["signs"] != theirs["signs"]
    assert flipped.sum() <= 1 + flipped[..., 0].size * 1e-4
    np.testing.assert_array_equal(ours["codes"], theirs["codes"])
    if encoder.scaled:
        same_signs = ~flipped.any(axis=2)
        np.testing.assert_allclose(
            ours["scales"][same_signs], theirs["scales"][same_signs], rtol=2**-7
        )
    np.testing.assert_array_equal(found.values.affine, expected.values.affine)
    if expected.window is not None:
        np.testing.assert_array_equal(found.window.keys, expected.window.keys)
        np.testing.assert_array_equal(found.window.values, expected.window.values)


cases = st.fixed_dictionaries(
    {
        "codec": st.sampled_from(sorted(CODECS)),
        "head_dim": st.sampled_from([64, 96]),
        "value_bits": st.sampled_from([4, 3, 2]),
        "window": st.booleans(),
        "relative": st.booleans(),
        "dtype": st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
        "positions": st.lists(st.sampled_from(POSITIONS), min_size=9, max_size=9),
        "seed": st.integers(0, 100),
    }
)


@given(cases)
@settings(deadline=None, max_examples=8)
def test_the_kernel_writes_what_the_reference_writes(case):
    codec = CODECS[case.pop("codec")]
    encoder, _ = encoder_of(codec, case.pop("head_dim"), seed=case["seed"])
    arguments = inputs(encoder, **case)
    expected = jax.jit(reference.append_token)(*arguments)
    assert_same(run_blocks(*arguments), expected, *arguments[2:])


@pytest.mark.parametrize("name", CODECS)
def test_what_is_written_is_what_the_codec_encodes(name):
    codec = CODECS[name]
    encoder, parameters = encoder_of(codec)
    stored, layer, _, token = inputs(encoder, positions=(0, 70, 255))
    written = append_token(stored, layer, encoder, token)

    one_layer = jax.tree.map(lambda array: array[LAYER], parameters)
    encoded = codec.encode(one_layer, token.keys)
    found = columns(written, 2, encoder.bits, 64)
    for row, position in enumerate((0, 70, 255)):
        np.testing.assert_array_equal(found["signs"][row, ..., position], encoded.bits[row])
        if encoded.scale is not None:
            np.testing.assert_array_equal(found["scales"][row, ..., position], encoded.scale[row])


@pytest.mark.parametrize("position", [-1, CAPACITY])
def test_nothing_is_written_outside_the_capacity(position):
    encoder, _ = encoder_of(CODECS["linear"])
    arguments = inputs(encoder, positions=(position,))
    for write in (append_token, run_blocks):
        jax.tree.map(np.testing.assert_array_equal, write(*arguments), arguments[0])


def test_other_layers_rows_and_columns_stay_as_they_are():
    encoder, _ = encoder_of(CODECS["signs"])
    stored, *rest = inputs(encoder, positions=(-1, 9), window=False)
    written = append_token(stored, *rest)
    changed = np.argwhere(np.asarray(written.keys.words != stored.keys.words))
    assert {tuple(index) for index in changed[:, [0, 1, 3]]} == {(LAYER, 1, 9)}


@pytest.mark.parametrize(("position", "slot"), [(0, 0), (2, 2), (3, 3), (7, 7), (8, 3), (12, 7)])
def test_the_window_keeps_its_first_tokens_and_a_ring(position, slot):
    encoder, _ = encoder_of(CODECS["signs"])
    stored, layer, _, token = inputs(encoder, positions=(position,), dtype=jnp.bfloat16)
    window = append_token(stored, layer, encoder, token).window
    assert window is not None
    kept = jax.lax.bitcast_convert_type(window.keys[LAYER, 0, slot], jnp.bfloat16)
    np.testing.assert_array_equal(kept, token.keys.reshape(-1))


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the kernel refuses this jax")
@pytest.mark.parametrize("name", CODECS)
def test_the_kernel_lowers_for_cuda_and_works_in_place(name):
    encoder, _ = encoder_of(CODECS[name])
    arguments = inputs(encoder, positions=(0, 1, 2, 3, 4), relative=name == "linear")
    run = jax.jit(partial(append_token, implementation="mosaic_gpu"))
    lowered = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in lowered.splitlines() if "custom_call" in line]
    aliased = re.findall(r"operand_index = (\d+)", call)
    assert len(aliased) == len(jax.tree.leaves(arguments[0]))
    # Nothing happens outside of the one call but the reshape of a scalar.
    operations = re.findall(r"stablehlo\.(\w+)", lowered)
    assert set(operations) <= {"custom_call", "reshape", "output_operand_alias"}


def test_what_the_kernel_does_not_take_is_refused():
    encoder, _ = encoder_of(CODECS["signs"], head_dim=80)
    with pytest.raises(ValueError, match="head_dim 80"):
        append_token(*inputs(encoder), implementation="mosaic_gpu")


@pytest.mark.skipif(jax.__version_info__ >= (0, 10, 2), reason="newer jax runs the kernel")
def test_a_jax_that_copies_is_refused():
    encoder, _ = encoder_of(CODECS["signs"])
    with pytest.raises(ValueError, match=r"0\.10\.2"):
        append_token(*inputs(encoder), implementation="mosaic_gpu")


def test_an_unknown_implementation_is_refused():
    encoder, _ = encoder_of(CODECS["signs"])
    unknown: Any = "cuda"
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        append_token(*inputs(encoder), implementation=unknown)


def test_arrays_that_do_not_fit_are_all_named():
    encoder, _ = encoder_of(CODECS["linear"])
    stored, layer, _, token = inputs(encoder)
    wrong = KeyEncoder(encoder.projection[..., :32, :], encoder.mean, scaled=False)
    with pytest.raises(ValueError, match=r"keys\.words.*scalars") as raised:
        append_token(stored, layer, wrong, token)
    assert "keys.scales" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("value_bits", [4, 3, 2])
def test_on_a_gpu_the_kernel_writes_what_the_reference_writes(name, head_dim, value_bits):
    encoder, _ = encoder_of(CODECS[name], head_dim)
    arguments = inputs(encoder, positions=POSITIONS, value_bits=value_bits, dtype=jnp.bfloat16)
    ours, theirs = (
        jax.jit(partial(append_token, implementation=implementation))(*arguments)
        for implementation in ("mosaic_gpu", "xla")
    )
    assert_same(ours, theirs, *arguments[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["h1b", "h1b-2plane", "h1b-p32-v2", "h1b-paper"])
def test_on_a_gpu_a_decode_step_copies_no_array_of_the_cache(preset):
    config = toy_config(hidden_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    spec, dtype, batch = CacheSpec.preset(preset), jnp.bfloat16, 8
    parameters = {name: array.astype(dtype) for name, array in toy_parameters(config).items()}
    codec = init_codec(config, spec, jax.random.key(0))
    decoder = Decoder(config, parameters, spec, codec)
    cache = decoder.init_cache(batch=batch, max_length=16384)

    @partial(jax.jit, donate_argnames="cache")
    def step(decoder, tokens, cache):
        return decoder(tokens, cache.lengths[:, None], cache)

    compiled = step.lower(decoder, jnp.zeros((batch, 1), jnp.int32), cache).compile()
    compiled_text, memory = compiled.as_text(), compiled.memory_analysis()
    assert compiled_text is not None
    assert memory is not None
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy", compiled_text)
    arrays = [array for array in jax.tree.leaves(cache) if array.ndim == 4]
    assert not {",".join(map(str, array.shape)) for array in arrays} & set(copied)
    layer = sum(array.nbytes for array in arrays) // config.num_layers
    assert memory.temp_size_in_bytes < layer / 4
