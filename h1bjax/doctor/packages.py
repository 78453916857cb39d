"""Which packages are installed, and which extras they make complete."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

PACKAGES = (
    "h1bjax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "tokenizers",
    "safetensors",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "jax-triton",
    "triton",
    "optax",
    "orbax-checkpoint",
)
"""Packages on whose versions it depends what runs."""

EXTRAS = MappingProxyType(
    {
        # CUDA 13 is installed by name, and does as well.
        "gpu": (("jax-cuda12-plugin",), ("jax-cuda13-plugin",)),
        "tpu": (("libtpu",),),
        "triton": (("jax-triton", "triton"),),
        "train": (("matplotlib", "optax", "orbax-checkpoint", "zstandard"),),
        "eval": (("lm-eval", "matplotlib"),),
    }
)
"""The extras of this package, with the sets of packages that each can be."""


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Python's version, and those of `PACKAGES` that are installed."""
    found = {package: installed_version(package) for package in PACKAGES}
    return {
        "python": platform.python_version(),
        **{package: number for package, number in found.items() if number is not None},
    }


def missing_packages(extra: str) -> tuple[str, ...]:
    """The packages without which an extra of `EXTRAS` is incomplete; none where it is complete."""
    choices = [
        tuple(package for package in packages if installed_version(package) is None)
        for packages in EXTRAS[extra]
    ]
    return min(choices, key=len)


def import_problem() -> str | None:
    """What keeps the packages that all commands need from being imported; None if nothing does."""
    for module in ("jax", "flax.nnx", "safetensors", "tokenizers"):
        try:
            import_module(module)
        # A flax that is older than its jax asks it for what is no longer there.
        except (ImportError, AttributeError) as error:
            return (
                f"{module} cannot be imported: {error}; pip install --upgrade h1bjax jax flax "
                "brings versions that suit each other"
            )
    return None
