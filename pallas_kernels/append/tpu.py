"""The append on TPUs: XLA makes each token's column, one kernel stores all of them in place.

A column is one lane of the blocks of 128 tokens that hold it, so a grid step reads these blocks of
one row, exchanges a lane, and writes them back where they were.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped, UInt16

from pallas_kernels.affine import quantise
from pallas_kernels.append.arguments import KeyEncoder, StoredTokens, Token
from pallas_kernels.append.reference import encode_keys
from pallas_kernels.packing import pack_column, pack_scalar_pair, scalar_index, to_storage

_LANES = 128
_LOW_HALF = 0xFFFF
_WINDOW_ROWS = 16
"""Rows of 16-bit numbers that lie in one register."""


class Place(NamedTuple):
    """Where each row's token goes, known before the grid steps. Arrays, or the refs to them.

    Attributes:
        layer: one number.
        position: of the column; -1 where nothing is written.
        slot: of the window.
    """

    layer: Any
    position: Any
    slot: Any


class Store(NamedTuple):
    """One array that the kernel writes to.

    Attributes:
        stored: of all layers.
        column: of each row of the batch.
        rows: of a block.
        lanes: of a block.
        block: from a position and a slot to the block's row and column, in blocks.
        exchange: from the block, the column, a position and a slot to the new block.
    """

    stored: Shaped[Array, "layers batch rows columns"]
    column: Shaped[Array, "batch column_rows column_lanes"]
    rows: int
    lanes: int
    block: Callable[[Array, Array], tuple[Any, Any]]
    exchange: Callable[[Array, Array, Array, Array], Array]


def append_token(
    stored: StoredTokens, layer: Int32[Array, ""], encoder: KeyEncoder, token: Token
) -> StoredTokens:
    """See `pallas_kernels.append.append_token`."""
    described = token.keys if token.relative_keys is None else token.relative_keys
    sketch = encode_keys(jax.tree.map(lambda array: array[layer], encoder), described)
    codes, step, zero = quantise(token.values, stored.values.bits, axis=-1)
    capacity = stored.keys.words.shape[-1]
    written = (token.positions >= 0) & (token.positions < capacity)
    position = jnp.where(written, token.positions, -1).astype(jnp.int32)
    stores = {
        "key_words": _columns(stored.keys.words, _flat(pack_column(sketch.bits, 1))),
        "value_words": _columns(stored.values.words, _flat(pack_column(codes, stored.values.bits))),
        "affine": _columns(stored.values.affine, pack_scalar_pair(step, zero)),
    }
    if stored.keys.scales is not None:
        assert sketch.scale is not None
        stores["scales"] = _scalars(stored.keys.scales, to_storage(sketch.scale))
    slot = jnp.zeros_like(position)
    window = stored.window
    if window is not None:
        size, sinks = window.keys.shape[2], window.sinks
        ring = sinks + (position - sinks) % (size - sinks)
        slot = jnp.where(position < sinks, jnp.maximum(position, 0), ring).astype(jnp.int32)
        for name in ("keys", "values"):
            vectors = _flat(getattr(token, name).astype(jnp.bfloat16))
            stores[f"window_{name}"] = _window(getattr(window, name), to_storage(vectors))
    place = Place(layer.reshape(1).astype(jnp.int32), position, slot)
    new = dict(zip(stores, _exchange_all(place, list(stores.values())), strict=True))
    if window is not None:
        window = replace(window, keys=new["window_keys"], values=new["window_values"])
    return StoredTokens(
        keys=replace(stored.keys, words=new["key_words"], scales=new.get("scales")),
        values=replace(stored.values, words=new["value_words"], affine=new["affine"]),
        window=window,
    )


def _flat(per_head: Shaped[Array, "batch kv_heads width"]) -> Shaped[Array, "batch rows"]:
    return rearrange(per_head, "b k w -> b (k w)")


def _columns(
    stored: Int32[Array, "layers batch rows tokens"], column: Int32[Array, "batch rows"]
) -> Store:
    """Words that lie one below the other."""

    def exchange(block: Array, column: Array, position: Array, slot: Array) -> Array:
        lane = lax.broadcasted_iota(jnp.int32, block.shape, 1)
        chosen = (lane == position % _LANES) & (position >= 0)
        return jnp.where(chosen, jnp.broadcast_to(column, block.shape), block)

    return Store(
        stored,
        column[..., None],
        rows=stored.shape[2],
        lanes=_LANES,
        block=lambda position, slot: (0, lax.div(position, _LANES)),
        exchange=exchange,
    )


def _scalars(
    stored: UInt16[Array, "layers batch scalar_rows half_tokens"],
    scalars: UInt16[Array, "batch kv_heads"],
) -> Store:
    """One scalar per head, in one of a pair of rows: as words, in one of their halves."""
    columns = stored.shape[3]
    lanes = min(columns, _LANES)
    capacity = 2 * columns

    def exchange(block: Array, column: Array, position: Array, slot: Array) -> Array:
        words = pltpu.bitcast(block, jnp.int32)
        half, at = scalar_index(position, capacity)
        lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
        chosen = (lane == at % lanes) & (position >= 0)
        new = jnp.broadcast_to(column, words.shape)
        low, high = (words & ~_LOW_HALF) | new, (words & _LOW_HALF) | (new << 16)
        changed = jnp.where(half == 0, low, high)
        return pltpu.bitcast(jnp.where(chosen, changed, words), jnp.uint16)

    return Store(
        stored,
        scalars.astype(jnp.int32)[..., None],
        rows=stored.shape[2],
        lanes=lanes,
        block=lambda position, slot: (0, lax.div(scalar_index(position, capacity)[1], lanes)),
        exchange=exchange,
    )


def _window(
    stored: UInt16[Array, "layers batch window channels"], vectors: UInt16[Array, "batch channels"]
) -> Store:
    """One row of the exact window."""
    size, channels = stored.shape[2:]
    rows = _WINDOW_ROWS if size % _WINDOW_ROWS == 0 else size

    def exchange(block: Array, column: Array, position: Array, slot: Array) -> Array:
        row = lax.broadcasted_iota(jnp.int32, block.shape, 0)
        chosen = (row == slot % rows) & (position >= 0)
        # Vectors of 16-bit numbers are not compared or chosen from, those of 32-bit ones are.
        new = jnp.broadcast_to(column.astype(jnp.int32), block.shape)
        return jnp.where(chosen, new, block.astype(jnp.int32)).astype(jnp.uint16)

    return Store(
        stored,
        vectors[:, None],
        rows=rows,
        lanes=channels,
        block=lambda position, slot: (lax.div(slot, rows), 0),
        exchange=exchange,
    )


def _exchange_all(place: Place, stores: list[Store]) -> list[Array]:
    """Writes each row's columns; every array is the result that it was an argument."""
    batch = stores[0].stored.shape[1]
    count = len(stores)

    def body(*refs: Any) -> None:
        given = Place(*refs[: len(place)])
        row = pl.program_id(0)
        position, slot = given.position[row], given.slot[row]
        columns, blocks, results = (
            refs[first : first + count] for first in range(len(place), len(refs), count)
        )
        for store, column, block, result in zip(stores, columns, blocks, results, strict=True):
            result[...] = store.exchange(block[...], column[0], position, slot)

    def spec(store: Store) -> pl.BlockSpec:
        def index(row: Array, layer: Any, position: Any, slot: Any) -> tuple:
            return layer[0], row, *store.block(jnp.maximum(position[row], 0), slot[row])

        return pl.BlockSpec((None, None, store.rows, store.lanes), index)

    def column_spec(store: Store) -> pl.BlockSpec:
        return pl.BlockSpec((1, *store.column.shape[1:]), lambda row, *place: (row, 0, 0))

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(place),
            grid=(batch,),
            in_specs=[column_spec(store) for store in stores] + [spec(store) for store in stores],
            out_specs=[spec(store) for store in stores],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(store.stored.shape, store.stored.dtype) for store in stores
        ],
        input_output_aliases={len(place) + count + index: index for index in range(count)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="append_token",
    )(*place, *(store.column for store in stores), *(store.stored for store in stores))
