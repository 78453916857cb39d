"""What this installation can do on this machine, and what is broken about it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from h1bjax.doctor.machine import Accelerator, Devices, accelerators, jax_devices, unused
from h1bjax.doctor.packages import (
    EXTRAS,
    import_problem,
    installed_versions,
    missing_packages,
)

if TYPE_CHECKING:
    from h1bjax.config import LlamaConfig
    from h1bjax.doctor.operations import Operation

__all__ = ["Report", "examine"]


@dataclass(frozen=True)
class Report:
    """What an examination found.

    Attributes:
        system: the operating system.
        versions: of Python and the packages that matter and are installed.
        extras: the missing packages of each extra; none where it is complete.
        accelerators: what the machine has, used or not.
        devices: what JAX uses, the default device's kind first.
        operations: how each operation runs on the default device; empty where JAX does not start.
        seconds: what a decode step of one layer took with compilation; None where it failed.
        notes: what is unusual, and nothing is wrong with.
        problems: what is broken, each with what to do.
    """

    system: str
    versions: dict[str, str]
    extras: dict[str, tuple[str, ...]]
    accelerators: tuple[Accelerator, ...]
    devices: tuple[Devices, ...]
    operations: tuple[Operation, ...]
    seconds: float | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def examine(preset: str, config: LlamaConfig, dtype: str = "bfloat16") -> Report:
    """Looks at packages and devices, and runs a decode step of one layer.

    Args:
        preset: the cache's.
        config: of the model, of which only the heads matter.
        dtype: the compute dtype.

    Raises:
        ValueError: there is no such preset, or it does not take the model's head dimension.
    """
    found = accelerators()
    devices: tuple[Devices, ...] = ()
    chosen: tuple[Operation, ...] = ()
    seconds = None
    notes: list[str] = []
    problems: list[str] = []
    if (problem := import_problem()) is not None:
        problems.append(problem)
    else:
        from h1bjax.cache import CacheSpec
        from h1bjax.doctor.operations import operations, try_step

        spec = CacheSpec.preset(preset)
        spec.check_head_dim(config.head_dim)
        try:
            devices = jax_devices()
            chosen = operations(spec, config, dtype)
            seconds = try_step(spec, config, dtype)
        # Compilers and kernels that do not suit JAX's version raise all of these.
        except (RuntimeError, ValueError, ImportError) as error:
            doing = "a decode step fails" if devices else "JAX finds no device"
            problems.append(f"{doing}: {' '.join(str(error).split())}")
    if devices:
        broken, notes = unused(found, devices)
        problems += broken
    return Report(
        system=platform.platform(),
        versions=installed_versions(),
        extras={extra: missing_packages(extra) for extra in EXTRAS},
        accelerators=found,
        devices=devices,
        operations=chosen,
        seconds=seconds,
        notes=tuple(notes),
        problems=tuple(problems),
    )
