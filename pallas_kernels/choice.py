"""Which implementation of an operation runs, and why."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import jax

from pallas_kernels.device import cuda_capability
from pallas_kernels.mosaic_tpu.device import OLDEST, tpu_generation
from pallas_kernels.mosaic_tpu.layout import relayout

Implementation = Literal["xla", "mosaic_gpu", "triton", "mosaic_tpu"]

HOPPER = (9, 0)
AMPERE = (8, 0)


def has_large_blocks(capability: tuple[int, int]) -> bool:
    """Whether a block of threads may have the 227 KiB of shared memory that Mosaic's kernels need.

    So it is on Hopper and on Blackwell for data centres, and not on Blackwell's other chips, 12.x.
    """
    return capability[0] in (9, 10)


_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An implementation, and why it was chosen."""

    implementation: Implementation
    reason: str


def choose(
    operation: str,
    implementation: Implementation | None,
    kernels: Mapping[Implementation, Callable[[], str | None]],
    stored: Any,
) -> Choice:
    """The implementation of an operation that runs; each way is logged once, at level INFO.

    Args:
        operation: its name, for messages.
        implementation: what the caller asks for; None takes the kernel for the default device
            wherever it can run, and plain XLA else.
        kernels: in what the operation has kernels, each with a function that says why it cannot
            run the arguments, None if it can. Called only where it may run, because what it needs
            may take long to import, or be missing.
        stored: the arrays of the cache, or their shapes. A TPU kernel is not taken where XLA would
            copy them for it.

    Raises:
        ValueError: there is no such implementation, or it cannot run the arguments.
        ImportError: it needs a package that is not installed.
    """
    if implementation is None:
        choice = _fastest(kernels, stored)
    else:
        choice = _wanted(operation, implementation, kernels)
    log_once(operation, choice)
    return choice


@cache
def log_once(operation: str, choice: Choice) -> None:
    """Logs how an operation runs, once for each way."""
    _log.info("%s runs as %s: %s", operation, choice.implementation, choice.reason)


def _wanted(
    operation: str,
    implementation: Implementation,
    kernels: Mapping[Implementation, Callable[[], str | None]],
) -> Choice:
    if implementation != "xla":
        if implementation not in kernels:
            raise ValueError(
                f"unknown implementation {implementation!r} of {operation}; "
                f"use one of {', '.join(('xla', *kernels))}, or None"
            )
        refusal = kernels[implementation]()
        if refusal is not None:
            raise ValueError(f"{operation} cannot run as {implementation!r}: {refusal}")
    return Choice(implementation, "the caller asked for it")


def _fastest(kernels: Mapping[Implementation, Callable[[], str | None]], stored: Any) -> Choice:
    kind, reason = found = _kind_of_kernels()
    if kind == "xla":
        return found
    if kind not in kernels:
        return Choice("xla", f"{reason}, for which there is no kernel")
    try:
        refusal = kernels[kind]()
    except ImportError as error:
        return Choice("xla", f"{kind} is not available: {error}")
    if refusal is None and kind == "mosaic_tpu":
        refusal = relayout(jax.tree.leaves(stored))
    return found if refusal is None else Choice("xla", f"{kind} cannot run this: {refusal}")


def _kind_of_kernels() -> Choice:
    """In what kernels for the default device are written; "xla" where there are none."""
    generation = tpu_generation()
    if generation is not None:
        if generation < OLDEST:
            return Choice("xla", f"TPU v{generation} is older than v{OLDEST}")
        return Choice("mosaic_tpu", f"a TPU v{generation}")
    capability = cuda_capability()
    if capability is None:
        return Choice("xla", "the default device is neither an NVIDIA GPU nor a TPU")
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < AMPERE:
        return Choice("xla", f"{name} is below {AMPERE[0]}.{AMPERE[1]}")
    return Choice("mosaic_gpu" if has_large_blocks(capability) else "triton", name)
