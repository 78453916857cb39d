"""Processes that run one job together: all compute, and the first one writes."""

import jax
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process writes the files that all share."""
    return jax.process_index() == 0


def wait_for_all(point: str) -> None:
    """Returns once every process has come to this point of the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)
