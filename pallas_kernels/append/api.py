"""The one entry to the append of a decode step."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.append import reference
from pallas_kernels.append.arguments import KeyEncoder, StoredTokens, Token
from pallas_kernels.choice import Choice, Implementation
from pallas_kernels.choice import choose as choose_implementation
from pallas_kernels.expected import Expected, misshapen
from pallas_kernels.packing import TOKEN_BLOCK, words_per_column


def append_token(
    stored: StoredTokens,
    layer: Int32[Array, ""],
    encoder: KeyEncoder,
    token: Token,
    *,
    implementation: Implementation | None = None,
) -> StoredTokens:
    """Sketches each row's new key, quantises its value, and writes both at its position.

    Donate the cache, and let nothing read the old one afterwards, so that nothing is copied.

    Args:
        stored: the cache of all layers.
        layer: which layer to write.
        encoder: of all layers.
        token: one new token of each row.
        implementation: None takes the fastest that can run on the default device.

    Returns:
        The cache with the tokens written.

    Raises:
        ValueError: the shapes do not describe one cache, or the implementation cannot run them.
    """
    _check(stored, encoder, token)
    chosen = choose(stored, encoder, token, implementation).implementation
    if chosen == "mosaic_gpu":
        from pallas_kernels.append import gpu_mosaic

        return gpu_mosaic.append_token(stored, layer, encoder, token)
    if chosen == "mosaic_tpu":
        from pallas_kernels.append import tpu

        return tpu.append_token(stored, layer, encoder, token)
    return reference.append_token(stored, layer, encoder, token)


def choose(
    stored: StoredTokens,
    encoder: KeyEncoder,
    token: Token,
    implementation: Implementation | None = None,
) -> Choice:
    """The implementation that `append_token` runs on these arguments; logged once, as INFO.

    Raises:
        ValueError: there is no such implementation, or it cannot run these arguments.
    """

    def refuse() -> str | None:
        from pallas_kernels.append import gpu_mosaic

        return gpu_mosaic.refusal(stored, encoder, token)

    return choose_implementation(
        "append_token", implementation, {"mosaic_gpu": refuse, "mosaic_tpu": lambda: None}, stored
    )


def _check(stored: StoredTokens, encoder: KeyEncoder, token: Token) -> None:
    batch, kv_heads, head_dim = token.keys.shape
    layers, _, _, tokens = stored.keys.words.shape
    bits = encoder.bits
    columns = (layers, batch)
    value_rows = kv_heads * words_per_column(head_dim, stored.values.bits)
    components = bits if encoder.magnitude is None else bits // 2
    per_head = (layers, kv_heads)
    expected: dict[str, Expected] = {
        "keys.words": (stored.keys.words, (*columns, kv_heads * (bits // 32), tokens)),
        "keys.scales": (stored.keys.scales, (*columns, 2 * kv_heads, tokens // 2)),
        "values.words": (stored.values.words, (*columns, value_rows, tokens)),
        "token.values": (token.values, token.keys.shape),
        "token.relative_keys": (token.relative_keys, token.keys.shape),
        "token.positions": (token.positions, (batch,)),
        "encoder.projection": (encoder.projection, (*per_head, components, head_dim)),
        "encoder.mean": (encoder.mean, (*per_head, head_dim)),
        "encoder.levels": (encoder.levels, (*per_head, bits)),
        "encoder.weight": (encoder.weight, (*per_head, bits)),
        "encoder.reading": (encoder.reading, (*per_head, bits, head_dim)),
        "encoder.metric": (encoder.metric, (*per_head, head_dim, head_dim)),
    }
    if stored.window is not None:
        window = (*columns, stored.window.keys.shape[2], kv_heads * head_dim)
        expected["window.keys"] = (stored.window.keys, window)
        expected["window.values"] = (stored.window.values, window)
    problems = misshapen(expected)
    words, halves = jnp.dtype(jnp.int32), jnp.dtype(jnp.uint16)
    dtypes: dict[str, tuple[Array | None, jnp.dtype]] = {
        "keys.words": (stored.keys.words, words),
        "keys.scales": (stored.keys.scales, halves),
        "values.words": (stored.values.words, words),
        "values.affine": (stored.values.affine, words),
    }
    if stored.window is not None:
        dtypes["window.keys"] = (stored.window.keys, halves)
        dtypes["window.values"] = (stored.window.values, halves)
        if not 0 <= stored.window.sinks < stored.window.keys.shape[2]:
            problems.append(
                f"a window of {stored.window.keys.shape[2]} tokens cannot begin with "
                f"{stored.window.sinks} sinks"
            )
    problems += [
        f"{name} is {array.dtype}, expected {dtype}"
        for name, (array, dtype) in dtypes.items()
        if array is not None and array.dtype != dtype
    ]
    if bits % 32:
        problems.append(f"a sketch of {bits} bits does not pack into 32-bit words")
    if tokens % TOKEN_BLOCK:
        problems.append(f"{tokens} tokens are not a multiple of {TOKEN_BLOCK}")
    affine = stored.values.affine.shape
    if affine != (*columns, kv_heads, tokens):
        problems.append(
            f"values.affine has shape {affine}, expected {(*columns, kv_heads, tokens)}: one "
            "scale and zero for the whole head"
        )
    if encoder.scaled != (stored.keys.scales is not None):
        problems.append("the encoder gives scalars exactly where the keys store them")
    if (encoder.levels is None) != (encoder.weight is None):
        problems.append("the encoder's levels and weight come together")
    if (encoder.reading is None) != (encoder.metric is None):
        problems.append("the encoder's reading and metric come together")
    if encoder.magnitude is not None and encoder.levels is not None:
        problems.append("an encoder has a magnitude or levels, not both")
    if not jnp.issubdtype(token.positions.dtype, jnp.integer):
        problems.append(f"positions are {token.positions.dtype}, not integers")
    if problems:
        raise ValueError("append_token: " + "; ".join(problems))
