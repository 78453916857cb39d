"""Whether arrays have the shapes that an operation expects."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from jaxtyping import Array

Expected: TypeAlias = tuple[Array | np.ndarray | None, tuple[int, ...]]
"""An array, and the shape that it should have."""


def misshapen(expected: Mapping[str, Expected]) -> list[str]:
    """What is wrong with arrays, by their names; nothing is with those that are None."""
    return [
        f"{name} has shape {array.shape}, expected {shape}"
        for name, (array, shape) in expected.items()
        if array is not None and array.shape != shape
    ]
