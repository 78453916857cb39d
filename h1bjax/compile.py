"""Compiling functions that take decode steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Generic, ParamSpec, TypeVar

import jax

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

GPU_OPTIONS: Mapping[str, bool | int | str] = MappingProxyType(
    {
        # Layers run under a scan. Library calls read a layer's weights where they lie in the stack;
        # XLA's own matrix products would have them copied out of it first, every layer, every step.
        "xla_gpu_enable_triton_gemm": False,
        # Products with the same input would be merged, by copying their weights together.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # Most products and all that lies between them are too small to fill a GPU: what does not
        # wait for each other runs side by side.
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    }
)
"""XLA's options for decode steps on a GPU."""


def decoding_options() -> dict[str, bool | int | str]:
    """`compiler_options` of `jax.jit` for decode steps on the default device."""
    return dict(GPU_OPTIONS) if jax.default_backend() == "gpu" else {}


@dataclass(frozen=True)
class DecodingFunction(Generic[_Arguments, _Result]):
    """A function compiled with `decoding_options`, which apply unless another jit calls it.

    Attributes:
        function: takes decode steps.
        options: further ones of `jax.jit`.
    """

    function: Callable[_Arguments, _Result]
    options: Mapping[str, Any]

    @cached_property
    def compiled(self) -> Any:
        """What direct calls run."""
        return jax.jit(self.function, compiler_options=decoding_options() or None, **self.options)

    @cached_property
    def nested(self) -> Any:
        """What calls under another transformation run: options belong to the outermost jit."""
        return jax.jit(self.function, **self.options)

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        """Runs the function."""
        leaves = jax.tree.leaves((args, kwargs))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return (self.nested if traced else self.compiled)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As `jax.jit` has it; shapes and dtypes will do."""
        return self.compiled.lower(*args, **kwargs)


def jit_decoding(
    **options: Any,
) -> Callable[[Callable[_Arguments, _Result]], DecodingFunction[_Arguments, _Result]]:
    """`jax.jit` for functions that take decode steps; a decorator with the same options."""
    return lambda function: DecodingFunction(function, MappingProxyType(options))
