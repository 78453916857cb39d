"""Reading prompts into the cache of a whole model."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from h1bjax.bench.case import Case, Measured
from h1bjax.bench.subject import Subject
from h1bjax.generate import prefill


def measure(case: Case) -> Measured:
    """Reads random prompts of `case.context` tokens, as `generate` does, with random weights.

    Raises:
        ValueError: the cache does not suit the model; a largest batch is asked for.
        RuntimeError: the device's memory does not suffice, or logits were not finite.
    """
    if case.batch is None:
        raise ValueError("a largest batch is found for decoding alone")
    subject = Subject.create(case)
    rng = np.random.default_rng(0)
    prompts = rng.integers(case.config.vocab_size, size=(case.batch, case.context)).tolist()
    cache = subject.decoder.init_cache(batch=case.batch, max_length=case.context)
    seconds = []
    for _ in range(1 + case.repetitions):
        # Full as it is, the cache counts as empty again, and is overwritten.
        cache = jax.block_until_ready(replace(cache, lengths=jnp.zeros_like(cache.lengths)))
        begin = time.perf_counter()
        logits, cache = jax.block_until_ready(
            prefill(subject.decoder, prompts, cache, exact=case.exact_prefill)
        )
        seconds.append(time.perf_counter() - begin)
        if not np.isfinite(logits).all():
            raise RuntimeError(f"cache {case.preset!r}: logits were not finite")
    return subject.measured(
        case,
        cache,
        seconds[1:],
        tokens=case.batch * case.context,
        compile_seconds=seconds[0] - seconds[1],
    )
