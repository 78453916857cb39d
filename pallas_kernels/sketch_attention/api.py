"""The one entry to attention over sketched keys and quantised values."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.choice import Implementation
from pallas_kernels.expected import Expected, misshapen
from pallas_kernels.packing import TOKEN_BLOCK, VALUE_BITS, words_per_column
from pallas_kernels.sketch_attention.arguments import PackedKeys, PackedValues, SketchQuery
from pallas_kernels.sketch_attention.choice import choose, implementation_named
from pallas_kernels.sketch_attention.partial import Partial


def sketch_attention(
    query: SketchQuery,
    keys: PackedKeys,
    values: PackedValues,
    layer: Int32[Array, ""],
    *,
    start: int,
    stop: Int32[Array, "batch queries"],
    implementation: Implementation | None = None,
) -> Partial:
    """Attention of each query to the stored tokens `start <= n < stop`.

    Reads the packed arrays where they lie. Merge the result with other partials (an exact
    window, another shard) by `merge`.

    Args:
        query: the queries and how they score sketches; `heads` is a multiple of the KV heads,
            and query head `h` reads KV head `h // (heads // kv_heads)`.
        keys: sketches of all layers.
        values: value codes of all layers.
        layer: which layer to read.
        start: the first token that may be seen, the same for all rows.
        stop: for each query, one past the last token it sees; nothing is seen where
            `stop <= start`.
        implementation: which to run; None leaves it to `choose`, which says which and why.

    Returns:
        Float32 output `[batch, queries, heads, head_dim]` and log-sum-exp
        `[batch, queries, heads]`; 0 and -inf for a query that sees nothing.

    Raises:
        ValueError: the shapes do not describe one cache, or the implementation that was asked for
            cannot run them.
        ImportError: it needs a package that is not installed.
    """
    _check(query, keys, values, stop)
    chosen = choose(query, keys, values, implementation)
    attend = implementation_named(chosen.implementation).sketch_attention
    return attend(query, keys, values, layer, start=start, stop=stop)


def _check(
    query: SketchQuery, keys: PackedKeys, values: PackedValues, stop: Int32[Array, "batch queries"]
) -> None:
    if values.bits not in VALUE_BITS:
        raise ValueError(f"sketch_attention: values have 4, 3 or 2 bits, not {values.bits}")
    queries, heads, head_dim = query.vectors.shape[1:]
    kv_heads, transform_dim, bits = query.transform.shape
    layers, batch, _, tokens = keys.words.shape
    value_rows = kv_heads * words_per_column(head_dim, values.bits)
    expected = {
        "keys.words": (keys.words, (layers, batch, kv_heads * (bits // 32), tokens), jnp.int32),
        "values.words": (values.words, (layers, batch, value_rows, tokens), jnp.int32),
        "values.affine": (values.affine, (layers, batch, kv_heads, tokens), jnp.int32),
    }
    if keys.scales is not None:
        paired = (layers, batch, 2 * kv_heads, tokens // 2)
        expected["keys.scales"] = (keys.scales, paired, jnp.uint16)
    problems = [
        f"{name} is {array.dtype} {array.shape}, expected {jnp.dtype(dtype)} {shape}"
        for name, (array, shape, dtype) in expected.items()
        if array.shape != shape or array.dtype != dtype
    ]
    of_queries: dict[str, Expected] = {
        "stop": (stop, (batch, queries)),
        "query.scale": (query.scale, (heads,)),
        "query.variance": (query.variance, (batch, queries, heads)),
    }
    if query.rope is not None:
        of_queries["query.rope.frequencies"] = (query.rope.frequencies, (head_dim // 2,))
        of_queries["query.rope.mean"] = (query.rope.mean, (kv_heads, head_dim))
    if query.prepared is not None:
        of_queries["query.prepared.norm"] = (query.prepared.norm, (layers, kv_heads))
    problems += misshapen(of_queries)
    if bits % 32:
        problems.append(f"a sketch of {bits} bits does not pack into 32-bit words")
    if heads % kv_heads:
        problems.append(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if transform_dim != head_dim:
        problems.append(f"the transform takes {transform_dim} channels, queries have {head_dim}")
    if query.vectors.shape[0] != batch:
        problems.append(f"{query.vectors.shape[0]} rows of queries for {batch} rows of keys")
    if tokens % TOKEN_BLOCK:
        problems.append(f"{tokens} tokens are not a multiple of {TOKEN_BLOCK}")
    if query.variance is not None and keys.scales is None:
        problems.append("a variance correction needs the scalars of the keys")
    if query.planes not in (1, 2):
        problems.append(f"a component is of 1 or 2 planes, not {query.planes}")
    if query.rope is not None and (query.rope.period < 1 or TOKEN_BLOCK % query.rope.period):
        problems.append(f"a RoPE period of {query.rope.period} does not divide {TOKEN_BLOCK}")
    if problems:
        raise ValueError("sketch_attention: " + "; ".join(problems))
