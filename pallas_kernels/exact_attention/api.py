"""The one entry to attention over exact keys and values, stored token by token."""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int32, Shaped

from pallas_kernels.choice import Choice, Implementation
from pallas_kernels.choice import choose as choose_implementation
from pallas_kernels.exact_attention import reference
from pallas_kernels.expected import misshapen
from pallas_kernels.sketch_attention.partial import Partial


def exact_attention(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Shaped[Array, "layers batch tokens channels"],
    values: Shaped[Array, "layers batch tokens channels"],
    layer: Int32[Array, ""],
    *,
    dtype: DTypeLike,
    start: int,
    stop: Int32[Array, "batch queries"],
    implementation: Implementation | None = None,
) -> Partial:
    """Attention of each query to the stored tokens `start <= n < stop`, with logits `q·k/√D`.

    Args:
        query: query head `h` reads KV head `h // (heads // kv_heads)`.
        keys: of all layers, `channels = kv_heads · head_dim`; 16-bit floats as bit patterns.
        values: likewise.
        layer: which layer to read.
        dtype: of the stored keys and values.
        start: the first token that may be seen, the same for all rows.
        stop: for each query, one past the last token it sees.
        implementation: which to run; None leaves it to `choose`.

    Returns:
        Float32 output `[batch, queries, heads, head_dim]` and log-sum-exp
        `[batch, queries, heads]`; 0 and -inf for a query that sees nothing.

    Raises:
        ValueError: the shapes do not fit together, or the implementation that was asked for cannot
            run them.
    """
    _check(query, keys, values, jnp.dtype(dtype), stop)
    chosen = choose(query, keys, dtype, implementation)
    if chosen.implementation == "mosaic_gpu":
        from pallas_kernels.exact_attention import gpu_mosaic

        return gpu_mosaic.exact_attention(query, keys, values, layer, start=start, stop=stop)
    return reference.exact_attention(
        query, keys, values, layer, dtype=jnp.dtype(dtype), start=start, stop=stop
    )


def _check(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Shaped[Array, "layers batch tokens channels"],
    values: Shaped[Array, "layers batch tokens channels"],
    dtype: jnp.dtype,
    stop: Int32[Array, "batch queries"],
) -> None:
    batch, queries, heads, head_dim = query.shape
    kv_heads, rest = divmod(keys.shape[3], head_dim)
    problems = []
    if keys.shape != values.shape or keys.dtype != values.dtype:
        problems.append(
            f"keys {keys.dtype} {keys.shape} and values {values.dtype} {values.shape} must be alike"
        )
    if jnp.dtype(keys.dtype).itemsize != dtype.itemsize:
        problems.append(f"keys {keys.dtype} do not hold {dtype}")
    if keys.shape[1] != batch:
        problems.append(f"{batch} rows of queries for {keys.shape[1]} rows of keys")
    if rest or not kv_heads:
        problems.append(f"{keys.shape[3]} channels are no multiple of the queries' {head_dim}")
    elif heads % kv_heads:
        problems.append(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    problems += misshapen({"stop": (stop, (batch, queries))})
    if problems:
        raise ValueError("exact_attention: " + "; ".join(problems))


def choose(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Shaped[Array, "layers batch tokens channels"],
    dtype: DTypeLike,
    implementation: Implementation | None = None,
) -> Choice:
    """The implementation that `exact_attention` runs on these arguments; logged once, as INFO.

    Raises:
        ValueError: there is no such implementation, or it cannot run these arguments.
    """

    def refuse() -> str | None:
        from pallas_kernels.exact_attention import gpu_mosaic

        return gpu_mosaic.refusal(query, keys, jnp.dtype(dtype))

    return choose_implementation("exact_attention", implementation, {"mosaic_gpu": refuse}, keys)
