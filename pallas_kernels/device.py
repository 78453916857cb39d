"""What the default device is."""

import re

import jax


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the default device, such as (9, 0); None if it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    # AMD's GPUs name theirs otherwise, such as gfx90a.
    found = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return None if found is None else (int(found[1]), int(found[2]))
