"""What accelerators the machine has, and what JAX makes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from h1bjax.doctor.packages import installed_version

Accelerator = Literal["NVIDIA GPU", "TPU"]

_GOOGLE = "0x1ae0"
# Google's other PCI devices are network cards and disks.
_TPUS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


@dataclass(frozen=True)
class Devices:
    """Devices of one kind that JAX uses.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: its maker's name.
        count: how many, of all processes.
        memory: bytes of each that JAX may use; None where JAX does not say.
        used: bytes of the first one that are in use.
    """

    platform: str
    kind: str
    count: int
    memory: int | None
    used: int | None


def accelerators(root: Path = Path("/")) -> tuple[Accelerator, ...]:
    """The accelerators that Linux shows, whether or not JAX can use them.

    Args:
        root: of the file system.
    """
    found: list[Accelerator] = []
    if any(root.glob("dev/nvidia[0-9]*")) or any(root.glob("proc/driver/nvidia/gpus/*")):
        found.append("NVIDIA GPU")
    if any(root.glob("dev/accel[0-9]*")) or any(
        _content(vendor) == _GOOGLE and _content(vendor.with_name("device")) in _TPUS
        for vendor in root.glob("sys/bus/pci/devices/*/vendor")
    ):
        found.append("TPU")
    return tuple(found)


def jax_devices() -> tuple[Devices, ...]:
    """What JAX uses, the default device's kind first.

    Raises:
        RuntimeError: JAX cannot start.
    """
    import jax

    try:
        all_devices = jax.devices()
    except AssertionError as error:
        # So JAX ends where it was told a platform for which nothing is installed.
        platforms = os.environ.get("JAX_PLATFORMS")
        raise RuntimeError(f"nothing is installed for JAX_PLATFORMS={platforms}") from error
    kinds: dict[tuple[str, str], list[jax.Device]] = {}
    for device in all_devices:
        kinds.setdefault((device.platform, device.device_kind), []).append(device)
    found = []
    for (platform, kind), devices in kinds.items():
        own = [device for device in devices if device.process_index == jax.process_index()]
        stats = (own[0].memory_stats() if own else None) or {}
        found.append(
            Devices(
                platform, kind, len(devices), stats.get("bytes_limit"), stats.get("bytes_in_use")
            )
        )
    return tuple(found)


def unused(
    found: tuple[Accelerator, ...],
    devices: tuple[Devices, ...],
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[str], list[str]]:
    """Why JAX does not use an accelerator that is there.

    Args:
        found: what the machine has.
        devices: what JAX uses.
        environment: variables by which JAX may have been told not to.

    Returns:
        What is broken, with what to do; and what is on purpose.
    """
    used = {device.platform for device in devices}
    wanted = environment.get("JAX_PLATFORMS", "")
    problems, notes = [], []
    for accelerator in found:
        platform = "gpu" if accelerator == "NVIDIA GPU" else "tpu"
        if platform in used:
            continue
        names = ("gpu", "cuda") if platform == "gpu" else ("tpu",)
        if wanted and not any(name in wanted.split(",") for name in names):
            notes.append(f"the {accelerator} is not used, because JAX_PLATFORMS is {wanted!r}")
        elif used - {"cpu"}:
            notes.append(f"the {accelerator} is not used, because JAX prefers the {min(used)}")
        else:
            problems.append(f"there is a {accelerator}, but JAX runs on the CPU: {_cure(platform)}")
    return problems, notes


def _cure(platform: str) -> str:
    """What makes JAX use the accelerators of a platform, from what is installed."""
    plugins = ("jax-cuda12-plugin", "jax-cuda13-plugin") if platform == "gpu" else ("libtpu",)
    installed = [(name, installed_version(name)) for name in plugins]
    name, number = next((pair for pair in installed if pair[1] is not None), (plugins[0], None))
    if number is None:
        return f"{name} is not installed; pip install 'h1bjax[{platform}]'"
    jaxlib = installed_version("jaxlib")
    if platform == "gpu" and number != jaxlib:
        return f"{name} {number} does not match jaxlib {jaxlib}; pip install {name}=={jaxlib}"
    return (
        f"{name} {number} is installed; JAX_PLATFORMS={'cuda' if platform == 'gpu' else 'tpu'} "
        "python -c 'import jax; jax.devices()' says why it fails"
    )


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
