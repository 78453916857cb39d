"""What a measurement is asked for, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, Self

from h1bjax.config import LlamaConfig


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        config: of the model.
        preset: of the cache; for a peer, its name.
        batch: sequences; None for as many as the device's memory holds.
        context: tokens that each sequence holds at the end.
        repetitions: runs.
        steps: decode steps in a run; 0 where prompts are read.
        exact_prefill: whether prompts read themselves exactly.
        dtype: of weights and arithmetic.
        mesh: devices along each axis, such as "tensor=2"; None for one device.
    """

    config: LlamaConfig
    preset: str
    batch: int | None
    context: int
    repetitions: int
    steps: int = 0
    exact_prefill: bool = False
    dtype: str = "bfloat16"
    mesh: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"config": self.config.to_hf()}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**dict(written) | {"config": LlamaConfig.from_hf(written["config"])})


@dataclass(frozen=True)
class Measured:
    """The speed and memory of one model with one cache.

    Attributes:
        name: the cache preset, or the peer.
        batch: sequences.
        device: what it ran on.
        versions: of the packages that it ran with.
        seconds: of one decode step or of one reading of all prompts, the median over runs.
        fastest: the least over runs.
        slowest: the greatest over runs.
        tokens_per_second: of all sequences together, at the median.
        cache_nbytes: of keys and values with everything that belongs to them, on all devices
            together; what several hold alike counts once.
        weights_nbytes: of the parameters, on all devices together, counted likewise.
        peak_nbytes: the most memory that was in use at once, on the one device where that was
            most; None where the device does not tell.
        device_nbytes: memory of that device that could be used; None where it does not tell.
        compile_seconds: before the first run.
        notes: what was logged, such as which kernel ran and why.
        mesh: devices along each axis; None for one device.
    """

    name: str
    batch: int
    device: str
    versions: Mapping[str, str]
    seconds: float
    fastest: float
    slowest: float
    tokens_per_second: float
    cache_nbytes: int
    weights_nbytes: int
    peak_nbytes: int | None
    device_nbytes: int | None
    compile_seconds: float
    notes: tuple[str, ...] = ()
    mesh: str | None = None

    @classmethod
    def from_runs(cls, seconds: Sequence[float], *, tokens: int, **others: Any) -> Self:
        """From what each run took for so many tokens."""
        middle = median(seconds)
        return cls(
            seconds=middle,
            fastest=min(seconds),
            slowest=max(seconds),
            tokens_per_second=tokens / middle,
            **others,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**dict(written) | {"notes": tuple(written["notes"])})


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
