"""Launching attention of one query per row, with the tokens of each row split over blocks."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.combine import combine
from pallas_kernels.mosaic_gpu.launch import WARPS, Block, launch
from pallas_kernels.mosaic_gpu.merging import Merging
from pallas_kernels.sketch_attention.partial import Partial


def launch_attention(
    body: Callable[..., None],
    operands: Sequence[Array],
    *,
    batch: int,
    kv_heads: int,
    merging: Merging,
    shared_bytes: int,
) -> Partial:
    """Attention of all heads to all splits: each writes its part, and a second launch merges them.

    Args:
        body: gets its block of threads, the number of its row and KV head together, the number of
            its split, and the addresses of operands, outputs and log-sum-exps. It ends with
            `merging.write`.
        operands: what it reads.
        batch: rows.
        kv_heads: of each row.
        merging: how it writes.
        shared_bytes: shared memory of a block.
    """
    parts = (batch, kv_heads * merging.groups, merging.splits)

    def attend(block: Block, *addresses: object) -> None:
        split, place = block.index
        body(block, place, split, *addresses)

    output, lse = launch(
        attend,
        *operands,
        results=[
            jax.ShapeDtypeStruct((*parts, merging.head_dim), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ],
        grid=(merging.splits, batch * kv_heads),
        warpgroups=merging.warps // WARPS,
        shared_bytes=shared_bytes,
    )
    output, lse = combine(output, lse)
    return Partial(output[:, None], lse[:, None])
