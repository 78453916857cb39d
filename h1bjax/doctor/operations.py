"""How the operations of one model's decode step run on the default device, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Key

from h1bjax.cache import (
    CacheSpec,
    CodecParameters,
    KVCache,
    append_and_attend,
    choose_prefill,
)
from h1bjax.cache.append import appends_in_one_step
from h1bjax.cache.keys import KeyCodec
from h1bjax.cache.prepared import PreparedCodec
from h1bjax.cache.scoring import sketch_query
from h1bjax.config import LlamaConfig
from h1bjax.decoder import init_codec
from h1bjax.rope import rope_frequencies
from pallas_kernels import append, exact_attention, sketch_attention
from pallas_kernels.sketch_attention import PackedKeys, PackedValues, SketchQuery

_TOKENS = 256


@dataclass(frozen=True)
class Operation:
    """What runs for an operation, and why; "xla" is plain JAX."""

    name: str
    implementation: str
    reason: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Step:
    """The arguments of one decode step of a single layer, with a token of one sequence."""

    cache: KVCache
    codec: CodecParameters | None
    query: Float[Array, "1 1 heads head_dim"]
    keys: Float[Array, "1 1 kv_heads head_dim"]
    values: Float[Array, "1 1 kv_heads head_dim"]
    positions: Int32[Array, "1 1"]
    frequencies: Float[Array, "half_dim"]


def operations(spec: CacheSpec, config: LlamaConfig, dtype: DTypeLike) -> tuple[Operation, ...]:
    """The implementation of each operation of decoding and of reading prompts.

    Nothing is computed: shapes decide.

    Args:
        spec: of the cache.
        config: of the model.
        dtype: the compute dtype.

    Raises:
        ValueError: the spec does not take the model's head dimension.
    """
    spec.check_head_dim(config.head_dim)
    step = _shapes(spec, config, dtype)
    chosen = [_stored_attention(spec, step)]
    if step.cache.window_keys is not None:
        choice = exact_attention.choose(step.query, step.cache.window_keys, jnp.bfloat16)
        chosen.append(Operation("exact attention to the window", *choice))
    chosen.append(_append(spec, step))
    prefill = choose_prefill(spec, dtype, config.head_dim, exact=False)
    return (*chosen, Operation("attention of prompts", *prefill))


def try_step(spec: CacheSpec, config: LlamaConfig, dtype: DTypeLike) -> float:
    """Runs one layer's decode step with random numbers, as `operations` chooses.

    Returns:
        Seconds that it took, mostly to compile.

    Raises:
        RuntimeError: it does not compile or run, or its result is not finite.
    """
    begin = time.perf_counter()
    rng = np.random.default_rng(0)

    def fill(shape: jax.ShapeDtypeStruct) -> Array:
        # Whole numbers are positions, lengths and an empty cache.
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        return jnp.asarray(rng.normal(size=shape.shape), shape.dtype)

    output = jax.jit(_decode)(jax.tree.map(fill, _shapes(spec, config, dtype)))
    if not jnp.all(jnp.isfinite(output)):
        raise RuntimeError("a decode step of random numbers gave NaN or infinity")
    return time.perf_counter() - begin


def _shapes(spec: CacheSpec, config: LlamaConfig, dtype: DTypeLike) -> _Step:
    """Those of the arguments, in the places of the arrays."""
    one = replace(config, num_layers=1)

    def step(rng: Key[Array, ""]) -> _Step:
        def vectors(heads: int) -> Array:
            return jnp.zeros((1, 1, heads, config.head_dim), dtype)

        return _Step(
            cache=KVCache.init(one, spec, batch=1, max_length=_TOKENS, dtype=dtype),
            codec=init_codec(one, spec, rng),
            query=vectors(config.num_heads),
            keys=vectors(config.num_kv_heads),
            values=vectors(config.num_kv_heads),
            positions=jnp.zeros((1, 1), jnp.int32),
            frequencies=jnp.asarray(rope_frequencies(config)),
        )

    return jax.eval_shape(step, jax.random.key(0))


def _decode(step: _Step) -> Float[Array, "1 1 heads head_dim"]:
    return append_and_attend(
        step.cache,
        jnp.int32(0),
        step.query,
        step.keys,
        step.values,
        step.positions,
        _first_layer(step.codec),
        step.frequencies,
        prepared=PreparedCodec.of(step.cache.spec, step.codec),
    )[0]


def _first_layer(codec: CodecParameters | None) -> CodecParameters | None:
    return jax.tree.map(lambda array: array[0], codec)


def _stored_attention(spec: CacheSpec, step: _Step) -> Operation:
    cache, name = step.cache, "attention to the stored tokens"
    if spec.evict:
        return Operation(name, "none", "no tokens are stored outside the window")
    if spec.exact:
        assert cache.keys is not None
        return Operation(name, *exact_attention.choose(step.query, cache.keys, cache.dtype))
    if spec.sketch is None or not appends_in_one_step(spec, cache.head_dim):
        return Operation(name, "xla", "kernels read sketched keys, and values with one scale each")
    query = jax.eval_shape(partial(_query, spec, spec.sketch), step)
    return Operation(name, *sketch_attention.choose(query, *_packed(cache)))


def _query(spec: CacheSpec, codec: KeyCodec, step: _Step) -> SketchQuery:
    parameters = _first_layer(step.codec)
    assert parameters is not None
    return sketch_query(spec, codec, parameters, step.query, step.frequencies)[0]


def _append(spec: CacheSpec, step: _Step) -> Operation:
    cache, name = step.cache, "append of a token"
    if spec.sketch is None or not appends_in_one_step(spec, cache.head_dim):
        return Operation(name, "xla", "the kernel writes sketches, and values with one scale each")
    window = None
    if cache.window_keys is not None:
        assert cache.window_values is not None
        window = append.ExactWindow(cache.window_keys, cache.window_values, spec.sinks)
    encoder = jax.eval_shape(spec.sketch.encoder, step.codec)
    token = jax.eval_shape(partial(_token, spec), step)
    return Operation(
        name, *append.choose(append.StoredTokens(*_packed(cache), window), encoder, token)
    )


def _token(spec: CacheSpec, step: _Step) -> append.Token:
    keys = step.keys[:, 0]
    relative = None if spec.rope_period is None else keys.astype(jnp.float32)
    return append.Token(keys, step.values[:, 0], step.positions[:, 0], relative)


def _packed(cache: KVCache) -> tuple[PackedKeys, PackedValues]:
    """The stored part of a cache of sketches."""
    assert cache.key_words is not None and cache.spec.values is not None
    assert cache.value_words is not None and cache.value_affine is not None
    return (
        PackedKeys(cache.key_words, cache.key_scales),
        PackedValues(cache.value_words, cache.value_affine, cache.spec.values.bits),
    )
