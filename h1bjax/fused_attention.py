"""Exact causal attention over whole rows, by the fastest implementation that there is."""

import re
from contextlib import nullcontext
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

HOPPER = (9, 0)


class Choice(NamedTuple):
    """An implementation of `jax.nn.dot_product_attention`, and why it was chosen."""

    implementation: Literal["cudnn", "xla"]
    reason: str


def choose_implementation(dtype: DTypeLike, head_dim: int) -> Choice:
    """The implementation that `causal_attention` uses on the default device.

    Args:
        dtype: of queries, keys and values.
        head_dim: their width.
    """
    capability = _cuda_capability()
    if capability is None:
        return Choice("xla", "the default device is no NVIDIA GPU")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return Choice("xla", f"cuDNN's attention takes 16-bit floats, not {jnp.dtype(dtype)}")
    widest = 256 if capability >= HOPPER else 128
    if head_dim > widest or head_dim % 8:
        return Choice(
            "xla",
            f"cuDNN's attention takes a head_dim of multiples of 8 up to {widest} on this GPU, "
            f"not {head_dim}",
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
        query: after RoPE; no row has padding.
        key: after RoPE.
        value: of the same tokens.
    """
    chosen = choose_implementation(query.dtype, query.shape[-1]).implementation
    # 16-bit products are exact in any case; those of float32 would lose bits on GPU and TPU.
    wide = query.dtype == jnp.float32
    with jax.default_matmul_precision("highest") if wide else nullcontext():
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=chosen
        )


def _cuda_capability() -> tuple[int, ...] | None:
    """The compute capability of the default device, such as (9, 0); None where there is none."""
    if jax.default_backend() != "gpu":
        return None
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    # AMD's GPUs name theirs otherwise, such as gfx90a.
    found = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return None if found is None else tuple(map(int, found.groups()))
