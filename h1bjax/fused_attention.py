"""Causal attention over whole rows, by the fastest implementation that there is."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.choice import AMPERE, HOPPER
from pallas_kernels.device import cuda_capability

Implementation = Literal["cudnn", "xla"]


class Choice(NamedTuple):
    """An implementation of `jax.nn.dot_product_attention`, and why it was chosen."""

    implementation: Implementation
    reason: str


def choose_implementation(dtype: DTypeLike, channels: int) -> Choice:
    """The implementation that suits the default device.

    Args:
        dtype: of queries, keys and values.
        channels: their width.
    """
    capability = cuda_capability()
    if capability is None:
        return Choice("xla", "the default device is no NVIDIA GPU")
    if capability < AMPERE:
        older = "{}.{}".format(*capability)
        return Choice("xla", f"cuDNN's attention needs compute capability 8.0, not {older}")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return Choice("xla", f"cuDNN's attention takes 16-bit floats, not {jnp.dtype(dtype)}")
    widest = 256 if capability >= HOPPER else 128
    if channels > widest or channels % 8:
        return Choice(
            "xla",
            f"cuDNN's attention takes multiples of 8 channels up to {widest} on this GPU, "
            f"not {channels}",
        )
    return Choice("cudnn", "a GPU with 16-bit floats")


def causal_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens kv_heads head_dim"],
    value: Float[Array, "batch tokens kv_heads head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Softmax attention of each token to itself and all before it, with a gradient.

    Scores are `q·k/√head_dim` and the softmax is float32. Query head `h` reads KV head
    `h // (heads // kv_heads)`. cuDNN's is flash attention (arXiv 2307.08691) and never holds the
    scores; XLA's holds them all, in float32.

    Args:
        query: after RoPE; padding may only follow all other tokens of its row.
        key: after RoPE.
        value: of the same tokens.
    """
    chosen = choose_implementation(query.dtype, query.shape[-1]).implementation
    with _matmul_precision(query.dtype):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=chosen
        )


def _matmul_precision(dtype: DTypeLike) -> AbstractContextManager:
    # 16-bit products are exact in any case; those of float32 would lose bits on GPU and TPU.
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if wide else nullcontext()
