"""Decode steps of a whole model."""

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int32

from h1bjax.bench.case import Case, Measured
from h1bjax.bench.contents import random_cache
from h1bjax.bench.placement import cache_shapes, nbytes_per_device, shardings
from h1bjax.bench.subject import Subject, device_memory
from h1bjax.cache import KVCache
from h1bjax.compile import jit_decoding
from h1bjax.decoder import Decoder
from h1bjax.sharding import BATCH

_USABLE = 0.995
"""The part of the device's memory that is planned with: allocation rounds sizes up."""


def measure(case: Case) -> Measured:
    """Decodes greedily from a random cache with random weights, `case.steps` in one compiled loop.

    Raises:
        ValueError: the cache does not suit the model, the mesh does not suit the model, the batch
            or the devices, or not even one sequence fits.
        RuntimeError: the device's memory does not suffice, or logits were not finite.
    """
    subject = Subject.create(case)
    decoder = subject.decoder
    batch = _largest_batch(decoder, case) if case.batch is None else case.batch
    begin = time.perf_counter()
    compiled = _compile(decoder, case, batch)
    compile_seconds = time.perf_counter() - begin
    cache = random_cache(
        case.config,
        decoder.spec,
        batch=batch,
        max_length=case.context,
        dtype=decoder.dtype,
        rng=jax.random.key(1),
        mesh=decoder.mesh,
    )
    rows = cache.lengths.sharding
    tokens = jax.device_put(jnp.arange(batch, dtype=jnp.int32) % case.config.vocab_size, rows)
    seconds = []
    for _ in range(1 + case.repetitions):
        lengths = jnp.full(batch, case.context - case.steps, jnp.int32, device=rows)
        jax.block_until_ready((lengths, cache, tokens))
        begin = time.perf_counter()
        tokens, cache, finite = jax.block_until_ready(
            compiled(decoder, tokens, replace(cache, lengths=lengths))
        )
        seconds.append((time.perf_counter() - begin) / case.steps)
        if not finite:
            raise RuntimeError(f"cache {case.preset!r}: logits were not finite")
    return subject.measured(case, cache, seconds[1:], tokens=batch, compile_seconds=compile_seconds)


@jit_decoding(static_argnames="steps", donate_argnames=("tokens", "cache"))
def decode_steps(
    decoder: Decoder, tokens: Int32[Array, "batch"], cache: KVCache, *, steps: int
) -> tuple[Int32[Array, "batch"], KVCache, Bool[Array, ""]]:
    """Feeds each row its most probable token, `steps` times. Donates the tokens and the cache.

    Returns:
        The next tokens, the cache, and whether all logits were finite.
    """

    def step(_: Array, state: tuple[Array, KVCache, Array]) -> tuple[Array, KVCache, Array]:
        tokens, cache, finite = state
        logits, updated = decoder(tokens[:, None], cache.lengths[:, None], cache)
        assert updated is not None
        best = jnp.max(logits[:, 0], axis=-1)
        tokens = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        return tokens, updated, finite & jnp.all(jnp.isfinite(best))

    return jax.lax.fori_loop(0, steps, step, (tokens, cache, jnp.bool_(True)))


def _compile(decoder: Decoder, case: Case, batch: int) -> jax.stages.Compiled:
    cache, mesh = _cache_shapes(decoder, case, batch), decoder.mesh
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=cache.lengths.sharding)
    function = decode_steps
    if mesh is not None:
        # What one loop leaves, the next one takes.
        places = (*shardings((tokens, cache)), NamedSharding(mesh, PartitionSpec()))
        function = replace(function, options={**function.options, "out_shardings": places})
    return function.lower(decoder, tokens, cache, steps=case.steps).compile()


def _cache_shapes(decoder: Decoder, case: Case, batch: int) -> KVCache:
    return cache_shapes(
        case.config,
        decoder.spec,
        decoder.mesh,
        batch=batch,
        max_length=case.context,
        dtype=decoder.dtype,
    )


def _largest_batch(decoder: Decoder, case: Case) -> int:
    """The most sequences whose decode steps fit, as the compiler plans them.

    Bytes are those of one device, and all devices of a mesh hold as much. Sequences are counted in
    as many as the mesh's `batch` has, of which each device has a part of one.
    """
    limit = device_memory(decoder.mesh).get("bytes_limit")
    if limit is None:
        raise ValueError("this device does not tell its memory, so no largest batch can be found")
    usable = int(_USABLE * limit)
    sequences = 1 if decoder.mesh is None else decoder.mesh.shape[BATCH]
    row = nbytes_per_device(_cache_shapes(decoder, case, sequences))
    fixed = nbytes_per_device(decoder)
    rows = (usable - fixed) // row
    while rows > 0:
        excess = _planned(_compile(decoder, case, rows * sequences)) - usable
        if excess <= 0:
            return rows * sequences
        rows -= -(-excess // row)
    raise ValueError(
        f"one sequence of {case.context} tokens with the cache {case.preset!r} does not fit in "
        f"{limit} bytes of a device beside the model's {fixed}"
    )


def _planned(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device that a compiled function needs at once."""
    memory: Any = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
