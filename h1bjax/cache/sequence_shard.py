"""Which tokens of a row one of several shards stores."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from h1bjax.cache.spec import CacheSpec
from pallas_kernels.packing import TOKEN_BLOCK
from pallas_kernels.sketch_attention import Partial, merge


@dataclass(frozen=True)
class SequenceShard:
    """One of several shards, to which blocks of tokens are dealt in turn.

    Dealing in turn lets short rows use all shards. Within a shard tokens keep their order, so that
    what a query sees there is again a range.

    Attributes:
        axis: name of the mesh's axis, over which attention is merged.
        index: the shard's number.
        count: shards.
        block: consecutive tokens; the RoPE period where that is finite, so that a shard's blocks
            begin at even distances.
    """

    axis: str
    index: Int32[Array, ""]
    count: int
    block: int

    @classmethod
    def here(cls, axis: str, count: int, spec: CacheSpec) -> "SequenceShard":
        """That of the device which runs this, inside of a `shard_map`."""
        block = spec.rope_period or TOKEN_BLOCK
        if spec.sinks > block:
            raise ValueError(
                f"{spec.sinks} sinks do not lie in the first block of {block} tokens, "
                "as sequence shards need"
            )
        return cls(axis, jax.lax.axis_index(axis), count, block)

    def place(self, positions: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
        """Where the shard stores tokens; -1 for those that it does not store."""
        number = positions // self.block
        own = (positions >= 0) & (number % self.count == self.index)
        return jnp.where(own, number // self.count * self.block + positions % self.block, -1)

    def stop(self, stop: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
        """How many of its tokens lie before `stop`."""
        stop = jnp.maximum(stop, 0)
        turn = self.count * self.block
        rest = stop % turn - self.index * self.block
        return stop // turn * self.block + jnp.clip(rest, 0, self.block)

    def block_frequencies(self, frequencies: Float[Array, "half_dim"]) -> Float[Array, "half_dim"]:
        """RoPE frequencies by which the beginnings of blocks, as the shard counts, differ."""
        return self.count * frequencies

    @property
    def offset(self) -> Int32[Array, ""]:
        """Position of its first token."""
        return self.index * self.block

    def merge(self, partial: Partial) -> Partial:
        """The attention over the tokens of all shards, by one collective."""
        own = jnp.concatenate([partial.output, partial.lse[..., None]], axis=-1)
        found = jax.lax.all_gather(own, self.axis)
        return merge(*(Partial(part[..., :-1], part[..., -1]) for part in found))
