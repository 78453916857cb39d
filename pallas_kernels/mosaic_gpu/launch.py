"""Launching a kernel body over a grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.registers import I32, I64

WARPS = 4
"""Warps of a warpgroup, the unit in which threads are launched."""
SHARED_BYTES = 227 * 1024
"""Shared memory that a block may have on Hopper and on Blackwell 10.x."""


def refusal_of_version() -> str | None:
    """Why kernels cannot be launched with the JAX that is installed; None if they can."""
    if jax.__version_info__ < (0, 10, 2):
        return f"jax {jax.__version__} copies what a kernel reads; install jax 0.10.2 or later"
    return None


@dataclass(frozen=True)
class Block:
    """What a thread knows of where it runs.

    Attributes:
        index: the block's place on every axis of the grid.
        thread: the thread's number in its block.
        shared: byte address of the block's shared memory.
    """

    index: list[I32]
    thread: I32
    shared: I32

    @property
    def lane(self) -> I32:
        """The thread's number in its warp."""
        return self.thread & 31

    @property
    def warp(self) -> I32:
        """The warp's number in its block."""
        return self.thread >> 5


def launch(
    body: Callable[..., None],
    *operands: Array,
    results: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    warpgroups: int,
    shared_bytes: int,
) -> Sequence[Array]:
    """Runs `body(block, *addresses)` in every thread of every block.

    Args:
        body: gets its `Block` and the byte address of each operand, then of each result.
        operands: dense arrays in global memory.
        results: shapes and dtypes of what the body writes; it must write all of it.
        grid: blocks on each axis, of which the last runs fastest.
        warpgroups: groups of 128 threads in a block.
        shared_bytes: shared memory of a block.

    Raises:
        NotImplementedError: the result is differentiated.
    """
    names = tuple(f"block{axis}" for axis in range(len(grid)))
    references = len(operands) + len(results)

    def inline(context: Any, *arguments: Any) -> None:
        *arrays, memory = arguments[: references + 1]
        index = [I32(each.registers.item()) for each in arguments[references + 1 :]]
        thread = I32(utils.thread_idx())
        body(
            Block(index, thread, _shared_address(memory)),
            *(_global_address(array) for array in arrays),
        )

    run = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * (references + 1) + (plgpu.Layout.WG_SPLAT,) * len(grid)
    )(inline)

    def kernel(*references: object) -> None:
        run(*references, *(lax.axis_index(name) for name in names))

    scratch = [plgpu.SMEM((max(shared_bytes, 128),), jax.numpy.int8)]
    launched = plgpu.kernel(
        kernel,
        grid=grid,
        grid_names=names,
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        out_type=list(results),
        scratch_types=scratch,
    )
    without_gradient = jax.custom_jvp(launched)
    without_gradient.defjvp(_no_gradient)
    return without_gradient(*operands)


def _no_gradient(*_: Any) -> NoReturn:
    raise NotImplementedError("GPU kernels have no gradient; ask for implementation='xla'")


def _global_address(reference: ir.Value) -> I64:
    return I64(llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(reference)))


def _shared_address(reference: ir.Value) -> I32:
    return I32(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(reference)))
