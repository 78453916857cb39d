"""Which implementation of an operation runs, and why."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

from pallas_kernels.device import cuda_capability
from pallas_kernels.mosaic_tpu.device import OLDEST

Implementation = Literal["xla", "mosaic_gpu", "triton", "mosaic_tpu"]

HOPPER = (9, 0)
AMPERE = (8, 0)

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An implementation, and why it was chosen."""

    implementation: Implementation
    reason: str


@cache
def log_once(operation: str, choice: Choice) -> None:
    """Logs at level INFO how an operation runs, once for each way."""
    _log.info("%s runs as %s: %s", operation, choice.implementation, choice.reason)


def choose_on_hopper(
    operation: str, implementation: Implementation | None, refuse: Callable[[], str | None]
) -> Choice:
    """The choice for an operation that has a kernel for Hopper and later, and plain XLA else.

    Logged once, at level INFO.

    Args:
        operation: its name, for messages.
        implementation: what the caller asks for; None takes the kernel wherever it can run.
        refuse: why the kernel cannot run the arguments, None if it can. Called only where it may
            run, because Pallas's GPU modules take long to import.

    Raises:
        ValueError: there is no such implementation, or it cannot run the arguments.
    """
    choice = _choose_on_hopper(operation, implementation, refuse)
    log_once(operation, choice)
    return choice


def _choose_on_hopper(
    operation: str, implementation: Implementation | None, refuse: Callable[[], str | None]
) -> Choice:
    if implementation not in (None, "xla", "mosaic_gpu"):
        raise ValueError(
            f"unknown implementation {implementation!r} of {operation}; "
            "use 'xla', 'mosaic_gpu' or None"
        )
    if implementation == "xla":
        return Choice("xla", "the caller asked for it")
    if implementation is None and (cuda_capability() or (0, 0)) < HOPPER:
        return Choice("xla", "the default device is no NVIDIA GPU of Hopper or later")
    refusal = refuse()
    if implementation is not None and refusal is not None:
        raise ValueError(f"{operation} cannot run as {implementation!r}: {refusal}")
    if refusal is not None:
        return Choice("xla", f"mosaic_gpu cannot run this: {refusal}")
    return Choice("mosaic_gpu", "a GPU of Hopper or later")


def choose_on_tpu(generation: int, refusal: str | None, relayout: str | None) -> Choice:
    """The choice for an operation with a kernel for TPUs, where the default device is one.

    Args:
        generation: of the TPU.
        refusal: why the kernel cannot run the arguments, None if it can.
        relayout: why it would have them copied, None if it would not.
    """
    if generation < OLDEST:
        return Choice("xla", f"TPU v{generation} is older than v{OLDEST}")
    problem = refusal or relayout
    if problem is not None:
        return Choice("xla", f"mosaic_tpu cannot run this: {problem}")
    return Choice("mosaic_tpu", f"a TPU v{generation}")
