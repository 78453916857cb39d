"""Whether the default device is a TPU that the kernels are made for."""

import re

import jax

OLDEST = 5
"""The first generation whose matrix unit multiplies int8."""


def tpu_generation() -> int | None:
    """The generation of the default device, such as 5 for v5e; None if it is no TPU."""
    if jax.default_backend() != "tpu":
        return None
    found = re.match(r"TPU ?v?(\d+)", jax.devices()[0].device_kind)
    return None if found is None else int(found[1])
