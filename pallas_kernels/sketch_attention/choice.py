"""Which implementation of sketch attention runs, and why."""

from importlib import import_module
from types import ModuleType

import jax
from jaxtyping import Array, Float

from pallas_kernels.choice import (
    AMPERE,
    HOPPER,
    Choice,
    Implementation,
    choose_on_tpu,
    log_once,
)
from pallas_kernels.device import cuda_capability
from pallas_kernels.mosaic_tpu.device import tpu_generation
from pallas_kernels.mosaic_tpu.layout import relayout
from pallas_kernels.sketch_attention.arguments import (
    PackedKeys,
    PackedValues,
    PreparedTransform,
    SketchQuery,
)

_MODULES = {
    "xla": "reference",
    "mosaic_gpu": "gpu_mosaic",
    "triton": "gpu_triton",
    "mosaic_tpu": "tpu",
}


def choose(
    query: SketchQuery,
    keys: PackedKeys,
    values: PackedValues,
    implementation: Implementation | None = None,
) -> Choice:
    """The implementation that `sketch_attention` runs on these arguments.

    Only shapes and dtypes matter, so `jax.ShapeDtypeStruct`s will do. Each choice is logged once,
    at level INFO.

    Args:
        query: the queries.
        keys: the sketches.
        values: the value codes.
        implementation: what the caller asks for; None takes the fastest that can run on the
            default device.

    Raises:
        ValueError: there is no such implementation, or it cannot run these arguments.
        ImportError: it needs a package that is not installed.
    """
    if implementation is None:
        choice = _fastest(query, keys, values)
    else:
        if implementation not in _MODULES:
            raise ValueError(
                f"unknown implementation {implementation!r} of sketch_attention; "
                f"use one of {', '.join(_MODULES)}, or None"
            )
        refusal = implementation_named(implementation).refusal(query, keys, values)
        if refusal is not None:
            raise ValueError(f"sketch_attention cannot run as {implementation!r}: {refusal}")
        choice = Choice(implementation, "the caller asked for it")
    log_once("sketch attention", choice)
    return choice


def implementation_named(name: Implementation) -> ModuleType:
    """The module of an implementation, with `sketch_attention` and `refusal`.

    Imported only here, because an implementation may need packages that others do without.
    """
    return import_module(f"pallas_kernels.sketch_attention.{_MODULES[name]}")


def _fastest(query: SketchQuery, keys: PackedKeys, values: PackedValues) -> Choice:
    generation = tpu_generation()
    if generation is not None:
        refusal = implementation_named("mosaic_tpu").refusal(query, keys, values)
        return choose_on_tpu(generation, refusal, relayout(jax.tree.leaves((keys, values))))
    capability = cuda_capability()
    if capability is None:
        return Choice("xla", "the default device is no NVIDIA GPU")
    if capability < AMPERE:
        return Choice("xla", f"compute capability {capability[0]}.{capability[1]} is below 8.0")
    wanted: Implementation = "mosaic_gpu" if capability >= HOPPER else "triton"
    try:
        refusal = implementation_named(wanted).refusal(query, keys, values)
    except ImportError as error:
        return Choice("xla", f"{wanted} is not available: {error}")
    if refusal is not None:
        return Choice("xla", f"{wanted} cannot run this: {refusal}")
    return Choice(wanted, f"compute capability {capability[0]}.{capability[1]}")


def prepare_transform(
    transform: Float[Array, "layers kv_heads head_dim bits"],
) -> PreparedTransform | None:
    """What does not depend on queries, prepared once instead of for every token.

    Args:
        transform: `SketchQuery.transform` of all layers.

    Returns:
        What `SketchQuery.prepared` takes; None where the default device has no use for it.
    """
    capability = cuda_capability()
    if capability is None or capability < HOPPER:
        return None
    from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import prepare_transform

    return prepare_transform(transform)
