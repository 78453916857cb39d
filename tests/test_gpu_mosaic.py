"""What can be known of the Mosaic GPU kernels without a GPU: that they lower, and to what."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sketch_cases import CASES, KERNEL_CASES, build

from pallas_kernels import choice
from pallas_kernels.exact_attention import choose as choose_exact
from pallas_kernels.exact_attention import exact_attention
from pallas_kernels.mosaic_gpu.splitting import choose_splits
from pallas_kernels.packing import pack_column
from pallas_kernels.sketch_attention import choose, sketch_attention
from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import prepare_transform

pytestmark = pytest.mark.once

MATRIX_OF_BITS = "m16n8k128.row.col.s32.b1.b1.s32.and.popc"
MATRIX_OF_HALVES = "m16n8k16.row.col.f32.f16.f16.f32"


def lowered(case) -> str:
    (query, keys, values, layer, start, stop), _ = build(case)
    run = partial(sketch_attention, start=start, implementation="mosaic_gpu")
    function = jax.jit(lambda *arrays, stop: run(*arrays, stop=stop))
    traced = function.trace(query, keys, values, layer, stop=stop)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
def test_every_shape_lowers_for_cuda(case):
    assert "mosaic_gpu" in lowered(case)


def test_a_signed_query_attends_by_popcount():
    signed = lowered(CASES["as published: 256 signs and a signed query"])
    assert MATRIX_OF_BITS in signed
    assert MATRIX_OF_BITS not in lowered(CASES["one plane with its scalar"])


def test_other_queries_attend_by_half_precision():
    assert MATRIX_OF_HALVES in lowered(CASES["one plane with its scalar"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("several queries", "one query per row, not 5"),
        ("3-bit values of 8 channels", "head_dim of multiples of 16 up to 256, not 8"),
        ("3-bit values of 80 channels", "no 3-bit values of 80 channels"),
    ],
)
def test_what_it_cannot_run_is_refused_with_a_reason(name, reason):
    query, keys, values, layer, start, stop = build(CASES[name])[0]
    with pytest.raises(ValueError, match=f"cannot run as 'mosaic_gpu': .*{reason}"):
        sketch_attention(
            query, keys, values, layer, start=start, stop=stop, implementation="mosaic_gpu"
        )


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 128), (16, 64), (1, 96), (12, 256)])
def test_exact_attention_lowers_for_cuda(heads, head_dim):
    query = jax.ShapeDtypeStruct((2, 1, 2 * heads, head_dim), jnp.bfloat16)
    stored = jax.ShapeDtypeStruct((3, 2, 256, 2 * head_dim), jnp.uint16)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    stop = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    run = partial(exact_attention, dtype=jnp.bfloat16, start=0, implementation="mosaic_gpu")
    function = jax.jit(lambda *arrays, stop: run(*arrays, stop=stop))
    traced = function.trace(query, stored, stored, layer, stop=stop)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("tokens", "dtype", "reason"),
    [
        (408, jnp.bfloat16, "it reads 16 tokens at once, and rows have 408"),
        (64, jnp.float32, "it takes bfloat16 queries, keys and values, not float32 and bfloat16"),
    ],
)
def test_what_exact_attention_would_read_wrongly_is_refused(tokens, dtype, reason):
    query = jnp.zeros((2, 1, 8, 64), dtype)
    stored = jnp.zeros((3, 2, tokens, 128), jnp.uint16)
    with pytest.raises(ValueError, match=f"cannot run as 'mosaic_gpu': {reason}"):
        choose_exact(query, stored, jnp.bfloat16, "mosaic_gpu")


@pytest.mark.parametrize("bits", [64, 96, 128, 192, 256])
def test_the_transform_waits_where_the_bits_of_keys_lie(bits):
    head_dim = 32
    transform = np.random.default_rng(0).normal(size=(1, head_dim, bits)).astype(np.float32)
    prepared = prepare_transform(jnp.asarray(transform))
    halves = np.asarray(prepared.fragments)[0].view(np.float16) * float(prepared.norm[0])
    channel = np.arange(head_dim)
    part, upper, column, half = (channel // 16, channel % 16 // 8, channel % 8 // 2, channel % 2)
    for field in range(bits):
        words = np.asarray(pack_column(jnp.arange(bits) == field, 1)).view(np.uint32)
        word = int(np.flatnonzero(words)[0])
        byte, bit = divmod(int(words[word]).bit_length() - 1, 8)
        # Lane c of a row of lanes has word c of four, or half the bits of word c mod 2.
        read, lane = divmod(word, 4)
        if bits == 64:
            lane, bit = word + bit // 4 * 2, bit % 4
        register = 2 * (byte % 2) + upper
        row = 4 * (2 * lane + byte // 2) + column
        found = halves[read, bit, part, row, 2 * register + half]
        np.testing.assert_allclose(found, transform[0, :, field], rtol=1e-3, atol=1e-4)


def test_a_kernel_refuses_to_be_differentiated():
    query, keys, values, layer, start, stop = build(CASES["one plane with its scalar"])[0]

    def total(vectors):
        changed = replace(query, vectors=vectors)
        run = partial(sketch_attention, start=start, stop=stop, implementation="mosaic_gpu")
        return run(changed, keys, values, layer).output.sum()

    with pytest.raises(NotImplementedError, match="ask for implementation='xla'"):
        jax.jit(jax.grad(total)).trace(query.vectors)


# The choice


def on(monkeypatch, capability):
    monkeypatch.setattr(choice, "cuda_capability", lambda: capability)


@pytest.mark.parametrize(
    ("capability", "implementation", "reason"),
    [
        (None, "xla", "the default device is neither an NVIDIA GPU nor a TPU"),
        ((7, 5), "xla", "compute capability 7.5 is below 8.0"),
        ((9, 0), "mosaic_gpu", "compute capability 9.0"),
        ((10, 0), "mosaic_gpu", "compute capability 10.0"),
    ],
)
def test_the_device_decides(monkeypatch, capability, implementation, reason):
    on(monkeypatch, capability)
    query, keys, values, *_ = build(CASES["one plane with its scalar"])[0]
    assert choose(query, keys, values) == (implementation, reason)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_gpus_with_smaller_blocks_take_triton_where_it_is_installed(monkeypatch, capability):
    on(monkeypatch, capability)
    query, keys, values, *_ = build(CASES["one plane with its scalar"])[0]
    found = choose(query, keys, values)
    if find_spec("jax_triton") is None:
        assert found.implementation == "xla"
        assert found.reason.startswith("triton is not available: ")
    else:
        assert found.implementation == "triton"


def test_what_the_kernel_refuses_falls_back_and_says_why(monkeypatch):
    on(monkeypatch, (9, 0))
    query, keys, values, *_ = build(CASES["several queries"])[0]
    chosen = choose(query, keys, values)
    assert chosen.implementation == "xla"
    assert chosen.reason == "mosaic_gpu cannot run this: it takes one query per row, not 5"


def test_a_choice_is_logged_once(monkeypatch, caplog):
    choice.log_once.cache_clear()
    query, keys, values, *_ = build(CASES["one plane with its scalar"])[0]
    with caplog.at_level("INFO"):
        for _ in range(3):
            choose(query, keys, values)
    assert len(caplog.records) == 1
    assert "sketch_attention runs as xla" in caplog.text


def test_unknown_implementations_are_refused():
    query, keys, values, *_ = build(CASES["one plane with its scalar"])[0]
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        choose(query, keys, values, "cuda")  # type: ignore[arg-type]
    stored = jnp.zeros((1, 2, 128, 128), jnp.uint16)
    with pytest.raises(ValueError, match="unknown implementation 'triton' of exact_attention"):
        choose_exact(query.vectors, stored, jnp.bfloat16, "triton")


# Division of the work


@pytest.mark.parametrize(
    ("rows", "tokens", "splits"),
    [(64, 32768, 4), (8, 131072, 33), (512, 8192, 1), (192, 16384, 4), (1, 128, 1)],
)
def test_splits_fill_the_device_without_becoming_short(rows, tokens, splits):
    assert choose_splits(rows, slots=264, tiles=tokens / 256, overhead=2.0) == splits
