"""A decoder with random weights, and what is told of it when it has run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from h1bjax.bench.case import Case, Measured, versions
from h1bjax.bench.contents import random_parameters
from h1bjax.bench.placement import mesh_of
from h1bjax.cache import CacheSpec, KVCache
from h1bjax.decoder import Decoder, init_codec
from h1bjax.sharding import check_mesh


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        decoder: with random weights and an uncalibrated codec.
        weights_nbytes: of its parameters, without the codec's.
        log: collects what kernels log from here on.
    """

    decoder: Decoder
    weights_nbytes: int
    log: "_Log"

    @classmethod
    def create(cls, case: Case) -> "Subject":
        """The decoder that a case describes.

        Raises:
            ValueError: the cache does not suit the model, or the mesh the model or the devices.
        """
        log = _Log()
        config, spec = case.config, CacheSpec.preset(case.preset)
        spec.check_head_dim(config.head_dim)
        mesh = None if case.mesh is None else mesh_of(case.mesh)
        if mesh is not None:
            check_mesh(mesh, config)
        rng = jax.random.key(0)
        parameters = random_parameters(config, jnp.dtype(case.dtype), rng, mesh)
        decoder = Decoder(config, parameters, spec, init_codec(config, spec, rng), mesh)
        return cls(decoder, sum(array.nbytes for array in parameters.values()), log)

    def measured(
        self,
        case: Case,
        cache: KVCache,
        seconds: Sequence[float],
        *,
        tokens: int,
        compile_seconds: float,
    ) -> Measured:
        """The outcome of runs that took so many seconds for so many tokens."""
        memory = device_memory(self.decoder.mesh)
        return Measured.from_runs(
            seconds,
            tokens=tokens,
            name=case.preset,
            batch=cache.batch,
            device=jax.devices()[0].device_kind,
            versions=versions("jax", "jaxlib", "flax", "jax-triton"),
            cache_nbytes=cache.nbytes,
            weights_nbytes=self.weights_nbytes,
            peak_nbytes=memory.get("peak_bytes_in_use"),
            device_nbytes=memory.get("bytes_limit"),
            compile_seconds=compile_seconds,
            notes=tuple(self.log.lines),
            mesh=case.mesh,
        )


def device_memory(mesh: Mesh | None) -> dict[str, Any]:
    """What a device keeps about its memory, in bytes; nothing where it keeps nothing.

    Of the devices of a mesh it is the one that had most in use.
    """
    devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
    kept = [device.memory_stats() or {} for device in devices]
    return max(kept, key=lambda memory: memory.get("peak_bytes_in_use", 0))


class _Log(logging.Handler):
    """Collects what kernels log, which is what runs them and why."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("pallas_kernels")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
