"""The TPU kernels and decode steps, compiled for real chips: what they read, copy and need."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from sketch_cases import SketchCase
from test_append_kernel import CODECS, encoder_of
from tpu_ahead import CHIPS, GENERATIONS, assert_in_place, compile_step, lower, mesh_of, spread

from h1bjax.cache import CacheSpec
from h1bjax.config import LlamaConfig
from pallas_kernels import choice
from pallas_kernels.append import ExactWindow, StoredTokens, Token, append_token
from pallas_kernels.packing import words_per_column
from pallas_kernels.sketch_attention import (
    BlockRope,
    PackedKeys,
    PackedValues,
    SketchQuery,
    sketch_attention,
)

pytestmark = pytest.mark.once

TOKENS = 65536

PLAIN = SketchCase(head_dim=128, bits=128, groups=8, kv_heads=8, start=4, layers=8)
VARIANTS = {
    "one plane with its scalar": PLAIN,
    "variance of one plane": replace(PLAIN, variance=True),
    "variance of two planes, 2-bit values": replace(
        PLAIN, bits=256, variance=True, planes=2, value_bits=2
    ),
    "256 signs and a signed query": replace(PLAIN, bits=256, scalars=False, signed=True),
    "signed query of 64 bits": replace(PLAIN, bits=64, head_dim=64, scalars=False, signed=True),
    "one query head": replace(PLAIN, groups=1),
    "four query heads": replace(PLAIN, groups=4),
    "sixteen query heads": replace(PLAIN, groups=16),
    "one KV head": replace(PLAIN, kv_heads=1, layers=32),
    "one KV head of 64 channels": replace(PLAIN, kv_heads=1, head_dim=64, bits=64, layers=64),
    "two KV heads": replace(PLAIN, kv_heads=2, layers=16),
    "32 KV heads": replace(PLAIN, kv_heads=32, groups=1, layers=2),
    "64 channels": replace(PLAIN, head_dim=64, bits=64, layers=16),
    "64 channels, 3-bit values": replace(PLAIN, head_dim=64, bits=64, value_bits=3, layers=16),
    "96 channels": replace(PLAIN, head_dim=96, bits=96, layers=12),
    "96 channels, 3-bit values": replace(PLAIN, head_dim=96, bits=96, value_bits=3, layers=12),
    "256 channels": replace(PLAIN, head_dim=256, bits=256, kv_heads=4),
    "3-bit values": replace(PLAIN, value_bits=3),
    "2-bit values": replace(PLAIN, value_bits=2),
    "no scalars": replace(PLAIN, scalars=False),
    "period 32": replace(PLAIN, period=32, groups=4),
    "period 64, 2-bit values": replace(PLAIN, period=64, value_bits=2),
    "period 128 of 64 channels": replace(PLAIN, period=128, head_dim=64, bits=64, layers=16),
}

QUICK = [
    ("one KV head", "v5e"),
    ("variance of two planes, 2-bit values", "v5p"),
    ("256 signs and a signed query", "v6e"),
]
"""Each chip once, with features that the others lack."""


def pairs(names: Any, quick: list[tuple[str, str]], chips: Any = tuple(CHIPS)) -> list[Any]:
    """All combinations, of which those that are not quick are slow."""
    return [
        pytest.param(name, chip, marks=() if (name, chip) in quick else pytest.mark.slow)
        for name in names
        for chip in chips
    ]


def shapes(case: SketchCase, batch: int = 4) -> tuple[Any, ...]:
    """What `sketch_attention` takes, and a layer and stops."""
    kv_heads, heads = case.kv_heads, case.kv_heads * case.groups

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    stored = partial(array, jnp.int32, case.layers, batch)
    value_rows = kv_heads * words_per_column(case.head_dim, case.value_bits)
    scales = None
    if case.scalars:
        scales = array(jnp.uint16, case.layers, batch, 2 * kv_heads, TOKENS // 2)
    rope = None
    if case.period is not None:
        rope = BlockRope(
            array(jnp.float32, case.head_dim // 2),
            array(jnp.float32, kv_heads, case.head_dim),
            case.period,
        )
    query = SketchQuery(
        array(jnp.float32, batch, 1, heads, case.head_dim),
        array(jnp.float32, kv_heads, case.head_dim, case.bits),
        array(jnp.float32, heads),
        variance=array(jnp.float32, batch, 1, heads) if case.variance else None,
        rope=rope,
        signed=case.signed,
        planes=case.planes,
    )
    keys = PackedKeys(stored(kv_heads * case.bits // 32, TOKENS), scales)
    values = PackedValues(stored(value_rows, TOKENS), stored(kv_heads, TOKENS), case.value_bits)
    return query, keys, values, array(jnp.int32), array(jnp.int32, batch, 1)


@pytest.mark.parametrize(("variant", "chip"), pairs(VARIANTS, QUICK))
def test_attention_reads_the_stacked_cache_where_it_lies(variant, chip):
    case = VARIANTS[variant]
    mesh = mesh_of(chip)
    query, keys, values, layer, stop = spread(mesh, shapes(case))

    def attend(query, keys, values, layer, stop):
        return sketch_attention(
            query, keys, values, layer, start=case.start, stop=stop, implementation="mosaic_tpu"
        )

    lowered = lower(mesh, jax.jit(attend), query, keys, values, layer, stop)
    assert_in_place(lowered.compile(), (keys, values), (query, layer, stop), written=False)


@pytest.mark.parametrize("signed", [True, False])
def test_signed_queries_count_bits(signed):
    mesh = mesh_of("v5e")
    case = replace(PLAIN, scalars=False, signed=signed)
    run = partial(sketch_attention, start=4, implementation="mosaic_tpu")
    query, keys, values, layer, stop = spread(mesh, shapes(case))
    traced = jax.jit(lambda *arrays, stop: run(*arrays, stop=stop)).trace(
        query, keys, values, layer, stop=stop
    )
    assert ("population_count" in str(traced.jaxpr)) == signed


APPENDS = {
    "eight KV heads": ("signs", 8, 128, 4),
    "one KV head": ("signs", 1, 128, 4),
    "no scalars, 64 channels": ("unscaled", 4, 64, 2),
    "two planes, 3-bit values": ("two planes", 8, 128, 3),
    "a metric": ("linear", 4, 128, 4),
}


@pytest.mark.parametrize(
    ("variant", "chip"), pairs(APPENDS, [("one KV head", "v5e"), ("a metric", "v6e")])
)
def test_the_append_writes_where_the_cache_lies(variant, chip):
    codec, kv_heads, head_dim, value_bits = APPENDS[variant]
    layers, batch = 64 // kv_heads, 4
    mesh = mesh_of(chip)
    encoder, _ = encoder_of(CODECS[codec], kv_heads=kv_heads, head_dim=head_dim)
    case = SketchCase(
        head_dim=head_dim,
        bits=encoder.bits,
        kv_heads=kv_heads,
        layers=layers,
        scalars=encoder.scaled,
        value_bits=value_bits,
    )
    _, keys, values, layer, _ = shapes(case, batch)
    window: Any = jax.ShapeDtypeStruct((layers, batch, 64, kv_heads * head_dim), jnp.uint16)
    vectors: Any = jax.ShapeDtypeStruct((batch, kv_heads, head_dim), jnp.bfloat16)
    positions: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    stored = spread(mesh, StoredTokens(keys, values, ExactWindow(window, window, sinks=4)))
    encoder = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape[1:]), leaf.dtype), encoder
    )
    others = spread(mesh, (layer, encoder, Token(vectors, vectors, positions)))
    append = partial(append_token, implementation="mosaic_tpu")
    lowered = lower(mesh, jax.jit(append, donate_argnums=0), stored, *others)
    assert_in_place(lowered.compile(), stored, others, written=True)


# Decode steps

SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
# The weights of all layers do not fit into the memory of one v5e.
MODELS: dict[str, tuple[dict[str, Any], str, int]] = {
    "small": (SMALL, "batch=1", 8),
    "small on four chips": (SMALL, "batch=2,tensor=2", 32),
    "Llama 3 8B, eight layers": ({**LLAMA_3_8B, "num_hidden_layers": 8}, "batch=1", 8),
    "Llama 3 8B on four chips": (LLAMA_3_8B, "batch=2,tensor=2", 8),
    "one KV head per chip": ({**LLAMA_3_8B, "num_key_value_heads": 2}, "batch=2,tensor=2", 32),
}
"""The config, the mesh, and rows for a cache beside which what has a fixed size does not count."""
# The 12 rows that 3-bit values then have on a chip are not kept where they lie: XLA runs that.
COPIED = {("small on four chips", "h1b-v3"), ("one KV head per chip", "h1b-v3")}
PRESETS = ("h1b-signs", "h1b-paper", "h1b-2plane-v2", "h1b", "h1b-p32", "h1b-unscaled", "h1b-v3")
QUICK_STEPS = [
    ("small on four chips", "h1b-paper", "v5p"),
    ("small", "h1b-signs", "v5e"),
    ("one KV head per chip", "h1b-unscaled", "v6e"),
]


@pytest.mark.parametrize(
    ("model", "preset", "chip"),
    [
        pytest.param(*step, marks=() if step in QUICK_STEPS else pytest.mark.slow)
        for step in [
            (model, preset, chip) for model in MODELS for preset in PRESETS for chip in CHIPS
        ]
        if step[:2] not in COPIED
    ],
)
def test_a_decode_step_carries_the_cache_through_all_layers_in_place(
    monkeypatch, model, preset, chip
):
    monkeypatch.setattr(choice, "tpu_generation", lambda: GENERATIONS[chip])
    described, sizes, rows = MODELS[model]
    mesh, config, spec = mesh_of(chip, sizes), llama(described), CacheSpec.preset(preset)
    step = compile_step(mesh, config, spec, batch=rows, max_length=TOKENS)
    assert (step.compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2
    assert_in_place(step.compiled, step.cache, (step.decoder, step.tokens), written=True)


def llama(described: dict[str, Any]) -> LlamaConfig:
    rest = {
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    return LlamaConfig.from_hf(rest | described)
