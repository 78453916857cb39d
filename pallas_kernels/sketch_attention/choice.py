"""Which implementation of sketch attention runs, and why."""

from functools import partial
from importlib import import_module
from types import ModuleType

from jaxtyping import Array, Float

from pallas_kernels.choice import Choice, Implementation, has_large_blocks
from pallas_kernels.choice import choose as choose_implementation
from pallas_kernels.device import cuda_capability
from pallas_kernels.sketch_attention.arguments import (
    PackedKeys,
    PackedValues,
    PreparedTransform,
    SketchQuery,
)

_MODULES: dict[Implementation, str] = {
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

    def refusal(name: Implementation) -> str | None:
        found: str | None = implementation_named(name).refusal(query, keys, values)
        return found

    kernels: dict[Implementation, partial[str | None]] = {
        name: partial(refusal, name) for name in _MODULES if name != "xla"
    }
    return choose_implementation("sketch_attention", implementation, kernels, (keys, values))


def implementation_named(name: Implementation) -> ModuleType:
    """The module of an implementation: `sketch_attention`, and `refusal` where it is a kernel.

    Imported only here, because an implementation may need packages that others do without.
    """
    return import_module(f"pallas_kernels.sketch_attention.{_MODULES[name]}")


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
    if capability is None or not has_large_blocks(capability):
        return None
    from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import prepare_transform

    return prepare_transform(transform)
