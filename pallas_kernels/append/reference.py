"""The append as plain JAX: the definition, and what runs where there is no kernel."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, BFloat16, Bool, Float, Int32

from pallas_kernels.affine import quantise
from pallas_kernels.append.arguments import ExactWindow, KeyEncoder, StoredTokens, Token
from pallas_kernels.packing import pack_column, pack_scalar_pair, scalar_index, to_storage

_EXACT = jax.lax.Precision.HIGHEST


class Sketch(NamedTuple):
    """Sketched keys before packing.

    Attributes:
        bits: True is +1.
        scale: the scalar of each key; None for encoders without one.
    """

    bits: Bool[Array, "*tokens kv_heads bits"]
    scale: BFloat16[Array, "*tokens kv_heads"] | None


def append_token(
    stored: StoredTokens, layer: Int32[Array, ""], encoder: KeyEncoder, token: Token
) -> StoredTokens:
    """See `pallas_kernels.append.append_token`."""
    described = token.keys if token.relative_keys is None else token.relative_keys
    sketch = encode_keys(jax.tree.map(lambda array: array[layer], encoder), described)
    codes, step, zero = quantise(token.values, stored.values.bits, axis=-1)
    capacity = stored.keys.words.shape[-1]
    row = jnp.arange(token.positions.shape[0])
    # Scatters drop what lies beyond an array; a negative index would wrap around instead.
    written = (token.positions >= 0) & (token.positions < capacity)
    position = jnp.where(written, token.positions, capacity)

    def write(array: Array, columns: Array) -> Array:
        flat = rearrange(columns, "b k w -> b (k w)")
        return array.at[layer, row, :, position].set(flat, mode="drop")

    scales = stored.keys.scales
    if scales is not None:
        assert sketch.scale is not None
        half, column = scalar_index(position, capacity)
        pairs = rearrange(scales, "l b (k half) t -> l b k half t", half=2)
        pairs = pairs.at[layer, row, :, half, column].set(to_storage(sketch.scale), mode="drop")
        scales = pairs.reshape(scales.shape)
    affine = pack_scalar_pair(step, zero)[..., None]
    window = stored.window
    if window is not None:
        window = _write_window(window, layer, token, written)
    return StoredTokens(
        keys=replace(
            stored.keys,
            words=write(stored.keys.words, pack_column(sketch.bits, 1)),
            scales=scales,
        ),
        values=replace(
            stored.values,
            words=write(stored.values.words, pack_column(codes, stored.values.bits)),
            affine=write(stored.values.affine, affine),
        ),
        window=window,
    )


def encode_keys(encoder: KeyEncoder, keys: Float[Array, "*tokens kv_heads head_dim"]) -> Sketch:
    """Sketches keys in float32.

    Args:
        encoder: of one layer, without a layers axis.
        keys: of any number of tokens.
    """
    centred = keys.astype(jnp.float32) - encoder.mean
    u = jnp.einsum("...kd,kcd->...kc", centred, encoder.projection, precision=_EXACT)
    code_length = jnp.ones_like(u)
    if encoder.levels is not None:
        assert encoder.weight is not None
        level = jnp.clip(jnp.floor(u) + encoder.levels, 0.0, 2.0 * encoder.levels - 1.0)
        bits = jnp.floor(level / encoder.weight) % 2 == 1
    else:
        bits = u >= 0
    if encoder.magnitude is not None:
        typical = jnp.sqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True))
        large = jnp.abs(u) > encoder.magnitude * typical
        code_length = jnp.where(large, 3.0, 1.0)
        bits = jnp.concatenate([bits, bits == large], axis=-1)
    if not encoder.scaled:
        return Sketch(bits, None)
    if encoder.metric is None:
        energy = jnp.sum(jnp.square(centred), axis=-1)
        along = jnp.sum(code_length * jnp.abs(u), axis=-1)
    else:
        true, read = (
            jnp.einsum("...kd,ked->...ke", centred, matrix, precision=_EXACT)
            for matrix in (encoder.metric, encoder.reading)
        )
        energy = jnp.sum(jnp.square(true), axis=-1)
        along = jnp.sum(jnp.where(bits, read, -read), axis=-1)
    scale = jnp.where(along > 0, energy / jnp.where(along > 0, along, 1.0), 0.0)
    return Sketch(bits, jnp.minimum(scale, encoder.longest).astype(jnp.bfloat16))


def _write_window(
    window: ExactWindow, layer: Int32[Array, ""], token: Token, written: Bool[Array, "batch"]
) -> ExactWindow:
    size, sinks = window.keys.shape[2], window.sinks
    ring = sinks + (token.positions - sinks) % (size - sinks)
    slot = jnp.where(token.positions < sinks, token.positions, ring)
    slot = jnp.where(written, slot, size)
    row = jnp.arange(slot.shape[0])

    def write(array: Array, vectors: Array) -> Array:
        channels = to_storage(rearrange(vectors.astype(jnp.bfloat16), "b k d -> b (k d)"))
        return array.at[layer, row, slot].set(channels, mode="drop")

    return replace(
        window, keys=write(window.keys, token.keys), values=write(window.values, token.values)
    )
