"""Which implementation of an operation runs, and why."""

import logging
from functools import cache
from typing import Literal, NamedTuple

Implementation = Literal["xla", "mosaic_gpu", "triton"]

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
