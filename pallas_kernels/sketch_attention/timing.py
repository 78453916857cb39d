"""How long a call takes when many follow each other, as in decoding."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

CALLS = 16
"""Calls in a chain."""
ROUNDS = (1, 5)
"""How often the chain runs in the two loops whose difference is timed."""

_COPY_BYTES = 1 << 30
_PROFILED_RUNS = 5

Step = Callable[[Any, int, Array | None], Array]
"""Call number `i` on some arguments. It must use `after` in `ordered`, if there is one."""


class Seconds(NamedTuple):
    """A duration.

    Attributes:
        median: over repetitions.
        low: the lower quartile.
        high: the upper quartile.
        kernels: time in which a kernel ran, by CUPTI; None where that cannot be had.
    """

    median: float
    low: float
    high: float
    kernels: float | None


class Timed(NamedTuple):
    """What a chain of calls took and gave.

    Attributes:
        seconds: of one call.
        outputs: of every call of the chain.
    """

    seconds: Seconds
    outputs: Array


def ordered(x: Array, after: Array | None) -> Array:
    """`x` itself, but not before `after` is there."""
    return x if after is None else jax.lax.optimization_barrier((x, after))[0]


def steady_time(step: Step, arguments: Any, *, repetitions: int) -> Timed:
    """Times one call as the slope between a loop of one chain of 16 calls and one of five.

    Both loops are one compiled function each, take the same arguments and return one array, so
    that what the host does around them cancels; gaps between kernels do not. Decode steps are
    such loops too.

    Args:
        step: runs call `i` of 16.
        arguments: its first argument, arrays that are never constants of the program.
        repetitions: pairs of runs; each gives one slope.
    """

    def chain(arguments: Any, after: Array | None) -> Array:
        outputs: list[Array] = []
        for index in range(CALLS):
            outputs.append(step(arguments, index, outputs[-1] if outputs else after))
        return jnp.stack(outputs)

    def loop(arguments: Any, rounds: int) -> Array:
        first = jax.eval_shape(lambda: chain(arguments, None))
        return jax.lax.fori_loop(
            0,
            rounds,
            lambda _, outputs: chain(arguments, outputs[-1]),
            jnp.zeros(first.shape, first.dtype),
        )

    few, many = ROUNDS
    compiled = {
        rounds: jax.jit(loop, static_argnums=1).lower(arguments, rounds).compile()
        for rounds in ROUNDS
    }
    outputs = compiled[few](arguments)
    slopes = _slopes(
        lambda rounds: jax.block_until_ready(compiled[rounds](arguments)), few, many, repetitions
    )
    kernels = _kernel_seconds(compiled[few], arguments)
    return Timed(
        _summary([slope / CALLS for slope in slopes], None if kernels is None else kernels / CALLS),
        outputs,
    )


def copy_bandwidth(*, repetitions: int, nbytes: int = _COPY_BYTES) -> float:
    """Bytes per second, read and written ones together, of copying an array.

    Args:
        repetitions: pairs of runs.
        nbytes: of the array, which should be much larger than the device's caches.
    """
    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros(nbytes // 4, jnp.int32)

    def run(calls: int) -> None:
        y = x
        for _ in range(calls):
            y = copy(y)
        jax.block_until_ready(y)

    return 2 * nbytes / _summary(_slopes(run, 2, 8, repetitions), None).median


def _slopes(run: Callable[[int], Any], short: int, long: int, repetitions: int) -> list[float]:
    def seconds(calls: int) -> float:
        begin = time.perf_counter()
        run(calls)
        return time.perf_counter() - begin

    for calls in (short, long, short, long):
        run(calls)
    pairs = [(seconds(short), seconds(long)) for _ in range(repetitions)]
    return [(slow - fast) / (long - short) for fast, slow in pairs]


def _summary(slopes: list[float], kernels: float | None) -> Seconds:
    low, median, high = np.percentile(slopes, [25, 50, 75])
    return Seconds(float(median), float(low), float(high), kernels)


def _kernel_seconds(compiled: jax.stages.Compiled, arguments: Any) -> float | None:
    """The median over some runs of the time in which kernels run."""
    if jax.default_backend() != "gpu":
        return None
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(compiled, iterations=_PROFILED_RUNS)(arguments)
    except (ImportError, RuntimeError):
        # Without CUPTI, or while another profiler holds it.
        return None
    return None if milliseconds is None else float(np.median(milliseconds)) * 1e-3
