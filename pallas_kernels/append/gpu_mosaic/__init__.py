"""The append as one Mosaic GPU kernel, which writes into the cache where it lies."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Int32

from pallas_kernels.append.arguments import KeyEncoder, StoredTokens, Token
from pallas_kernels.append.gpu_mosaic.block import append_block
from pallas_kernels.append.gpu_mosaic.places import ROWS, WARPS, GlobalArray, Layout
from pallas_kernels.mosaic_gpu.launch import WARPS as WARPS_OF_A_GROUP
from pallas_kernels.mosaic_gpu.launch import refusal_of_version
from pallas_kernels.mosaic_gpu.registers import I32, I64

_WIDEST = 256
_SHARED_BYTES = 200 * 1024
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def refusal(stored: StoredTokens, encoder: KeyEncoder, token: Token) -> str | None:
    """Why this cannot run these arguments; None if it can. Only shapes and dtypes matter."""
    head_dim = token.keys.shape[-1]
    if head_dim % 32 or head_dim > _WIDEST:
        return f"head_dim {head_dim} is no multiple of 32 up to {_WIDEST}"
    for array in (token.keys, token.values, token.relative_keys):
        if array is not None and array.dtype not in _DTYPES:
            return f"keys and values of {array.dtype} are not floats of 16 or 32 bits"
    for parameter in jax.tree.leaves(encoder):
        if parameter.dtype != jnp.float32:
            return f"the encoder's parameters are {parameter.dtype}, not float32"
    if encoder.projection.shape[-2] % 32:
        return f"{encoder.projection.shape[-2]} components are no multiple of 32"
    if Layout.of(encoder).nbytes > _SHARED_BYTES:
        return f"a sketch of {encoder.bits} bits does not fit into a block's shared memory"
    version = refusal_of_version()
    if version is not None:
        return version
    return None


def append_token(
    stored: StoredTokens, layer: Int32[Array, ""], encoder: KeyEncoder, token: Token
) -> StoredTokens:
    """See `pallas_kernels.append.append_token`."""
    batch, kv_heads, _ = token.keys.shape
    read = operands(layer, encoder, token)
    # References are updated in place; arrays that a kernel returns would be new ones.
    updated = {name: jax.new_ref(array) for name, array in cache_arrays(stored).items()}
    arrays = read | cache_arrays(stored)

    def emit(_: object, head: Any, group: Any, *given: ir.Value) -> None:
        *references, memory = given
        append_block(
            I32(utils.thread_idx()),
            I32(_address(memory, 32)),
            I32(head.registers.item()),
            I32(group.registers.item()),
            {
                name: GlobalArray(I64(_address(reference, 64)), array.shape, array.dtype)
                for (name, array), reference in zip(arrays.items(), references, strict=True)
            },
            encoder,
            stored.values.bits,
            0 if stored.window is None else stored.window.sinks,
        )

    splat, reference = plgpu.Layout.WG_SPLAT, plgpu.RefType()
    kinds = (splat, splat) + (reference,) * (len(arrays) + 1)
    inline = plgpu.inline_mgpu(arg_types=kinds)(emit)

    def append_token_kernel(*references: object) -> None:
        inline(lax.axis_index("head"), lax.axis_index("group"), *references)

    kernel = plgpu.kernel(
        append_token_kernel,
        out_type=(),
        scratch_types=[plgpu.SMEM((Layout.of(encoder).nbytes,), jnp.int8)],
        grid=(kv_heads, -(-batch // ROWS)),
        grid_names=("head", "group"),
        num_threads=WARPS // WARPS_OF_A_GROUP,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    # Before jax 0.11 the batching rule around a kernel hides which references it updates.
    kernel.fun(*read.values(), *updated.values())
    return with_arrays(stored, {name: jax.freeze(ref) for name, ref in updated.items()})


def operands(layer: Int32[Array, ""], encoder: KeyEncoder, token: Token) -> dict[str, Array]:
    """What the kernel reads, by name."""
    relative = token.relative_keys
    arrays = {
        "layer": layer.reshape(1),
        "positions": token.positions,
        "exact_keys": None if relative is None else token.keys,
        "keys": token.keys if relative is None else relative,
        "values": token.values,
        "projection": encoder.projection,
        "mean": encoder.mean,
        "levels": encoder.levels,
        "weight": encoder.weight,
        "reading": encoder.reading,
        "metric": encoder.metric,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def cache_arrays(stored: StoredTokens) -> dict[str, Array]:
    """What the kernel writes, by name."""
    window = stored.window
    arrays = {
        "key_words": stored.keys.words,
        "key_scales": stored.keys.scales,
        "value_words": stored.values.words,
        "value_affine": stored.values.affine,
        "window_keys": None if window is None else window.keys,
        "window_values": None if window is None else window.values,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def with_arrays(stored: StoredTokens, arrays: Mapping[str, Array]) -> StoredTokens:
    """The cache with what the kernel has written: the inverse of `cache_arrays`."""
    window = stored.window
    if window is not None:
        window = replace(window, keys=arrays["window_keys"], values=arrays["window_values"])
    return StoredTokens(
        keys=replace(stored.keys, words=arrays["key_words"], scales=arrays.get("key_scales")),
        values=replace(stored.values, words=arrays["value_words"], affine=arrays["value_affine"]),
        window=window,
    )


def _address(reference: ir.Value, bits: int) -> ir.Value:
    integer = ir.IntegerType.get_signless(bits)
    return llvm.ptrtoint(integer, utils.memref_ptr(reference))
