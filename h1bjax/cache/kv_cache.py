"""The key-value cache: an immutable pytree of everything that decoding reads."""

from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int32, Shaped, UInt16

from h1bjax.cache.channel_keys import ChannelQuantisedKeys
from h1bjax.cache.spec import CacheSpec, padded_capacity
from h1bjax.config import LlamaConfig
from pallas_kernels.packing import storage_dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Compressed keys and values of all layers, and an exact window.

    Arrays are stacked over layers. Packed arrays keep tokens on the last axis, the layout that
    TPUs read without copies and GPUs at full speed; `pallas_kernels.packing` defines the rows.
    Exact arrays keep one token's channels together. 16-bit floats are held as their bit patterns
    (`pallas_kernels.packing.from_storage` reads them). Fields that the spec does not use are None.
    Updates return a new cache; donate the old one, so that nothing is copied.

    Attributes:
        key_words: sign bits, or codes of quantised keys; `rows = kv_heads · words per column`.
        key_scales: one bf16 scalar per key, as bit patterns in paired rows;
            `scalar_rows = 2·kv_heads`.
        key_groups: bf16 scale and zero in one word, of every channel and group of tokens, for
            keys quantised per channel; `channels = kv_heads · head_dim`.
        keys: exact keys after RoPE, in `dtype`; `channels = kv_heads · head_dim`.
        value_words: value codes; `rows = kv_heads · words per column`.
        value_affine: bf16 scale and zero of each value, or of each group of its channels, in one
            word; `group_rows = kv_heads · groups of a head`.
        values: exact values, in `dtype`.
        window_keys: bf16 keys after RoPE of the first S tokens, then a ring of the latest W,
            where token n ≥ S lies in slot `S + (n - S) mod W`.
        window_values: the values of the same tokens.
        lengths: tokens each row holds so far.
        spec: what is stored. Static.
        capacity: tokens each row has room for, a multiple of 128. Static.
        head_dim: channels of a key. Static.
        dtype: of exact keys and values; the compute dtype. Static.
        sliding_window: the model's, which no row may outgrow; None where it has none. Static.
        sequence_shards: parts of equal size into which tokens are divided, one after the other in
            the arrays; `h1bjax.cache.sequence_shard` says which token lies where. Static.
    """

    key_words: Int32[Array, "layers batch rows tokens"] | None
    key_scales: UInt16[Array, "layers batch scalar_rows half_tokens"] | None
    key_groups: Int32[Array, "layers batch channels groups"] | None
    keys: Shaped[Array, "layers batch tokens channels"] | None
    value_words: Int32[Array, "layers batch rows tokens"] | None
    value_affine: Int32[Array, "layers batch group_rows tokens"] | None
    values: Shaped[Array, "layers batch tokens channels"] | None
    window_keys: UInt16[Array, "layers batch window channels"] | None
    window_values: UInt16[Array, "layers batch window channels"] | None
    lengths: Int32[Array, "batch"]
    spec: CacheSpec = field(metadata={"static": True})
    capacity: int = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})
    sliding_window: int | None = field(metadata={"static": True})
    sequence_shards: int = field(default=1, metadata={"static": True})

    @classmethod
    def init(
        cls,
        config: LlamaConfig,
        spec: CacheSpec,
        *,
        batch: int,
        max_length: int,
        dtype: DTypeLike = jnp.bfloat16,
        sequence_shards: int = 1,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's.
            spec: what to store.
            batch: sequences.
            max_length: tokens each sequence can hold; rounded up to a multiple of 128.
            dtype: the compute dtype, in which exact keys and values are stored.
            sequence_shards: parts into which tokens are divided, each a multiple of 128.

        Raises:
            ValueError: a size is not positive, `max_length` exceeds the model's sliding window,
                or the spec does not take the model's head dimension.
        """
        if batch <= 0:
            raise ValueError(f"batch={batch} must be positive")
        capacity = padded_capacity(max_length, sequence_shards)
        if config.sliding_window is not None and max_length > config.sliding_window:
            raise ValueError(
                f"max_length={max_length} exceeds the model's sliding window of "
                f"{config.sliding_window} tokens, which the cache does not implement; "
                f"use max_length <= {config.sliding_window}"
            )
        heads, head_dim = config.num_kv_heads, config.head_dim
        channels = heads * head_dim

        def zeros(shape: tuple[int, int], dtype: DTypeLike) -> Array:
            return jnp.zeros((config.num_layers, batch, *shape), dtype)

        spec.check_head_dim(head_dim)
        key_words = key_scales = key_groups = keys = None
        if isinstance(spec.keys, ChannelQuantisedKeys):
            key_words = zeros((heads * spec.keys.words(head_dim), capacity), jnp.int32)
            key_groups = zeros((channels, capacity // spec.keys.group), jnp.int32)
        elif spec.keys is not None:
            rows = heads * spec.keys.sketch_bits(head_dim) // 32
            key_words = zeros((rows, capacity), jnp.int32)
            if spec.keys.scaled:
                key_scales = zeros((2 * heads, capacity // 2), jnp.uint16)
        elif not spec.evict:
            keys = zeros((capacity, channels), storage_dtype(dtype))
        value_words = value_affine = values = None
        if spec.values is not None:
            value_words = zeros((heads * spec.values.words(head_dim), capacity), jnp.int32)
            value_affine = zeros((heads * spec.values.groups(head_dim), capacity), jnp.int32)
        elif not spec.evict:
            values = zeros((capacity, channels), storage_dtype(dtype))
        window = (spec.exact_tokens, channels)
        return cls(
            key_words=key_words,
            key_scales=key_scales,
            key_groups=key_groups,
            keys=keys,
            value_words=value_words,
            value_affine=value_affine,
            values=values,
            window_keys=zeros(window, jnp.uint16) if spec.exact_tokens else None,
            window_values=zeros(window, jnp.uint16) if spec.exact_tokens else None,
            lengths=jnp.zeros(batch, jnp.int32),
            spec=spec,
            capacity=capacity,
            head_dim=head_dim,
            dtype=jnp.dtype(dtype),
            sliding_window=config.sliding_window,
            sequence_shards=sequence_shards,
        )

    @property
    def layers(self) -> int:
        """Layers held."""
        return self._some_keys.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        some = self._some_keys
        if some is not self.key_words:
            return some.shape[3] // self.head_dim
        if isinstance(self.spec.keys, ChannelQuantisedKeys):
            return some.shape[2] // self.spec.keys.words(self.head_dim)
        assert self.spec.keys is not None
        return 32 * some.shape[2] // self.spec.keys.sketch_bits(self.head_dim)

    @property
    def _some_keys(self) -> Array:
        """Whichever array of keys there is."""
        found = (self.window_keys, self.keys, self.key_words)
        return next(array for array in found if array is not None)

    @property
    def limit(self) -> int:
        """Tokens each row may hold."""
        window = self.sliding_window
        return self.capacity if window is None else min(self.capacity, window)

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, `lengths` excluded; equals `spec.nbytes`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self)) - self.lengths.nbytes

    def accepts(
        self, positions: Int32[Array, "batch tokens"], *, fresh: bool = False
    ) -> Bool[Array, "batch"]:
        """Which rows can take tokens at these positions.

        A row's valid positions must come first, continue its length one by one and stay below
        the limit; -1 marks the padding after them. With `fresh`, rows must hold no tokens yet.
        """
        tokens = positions.shape[1]
        count = jnp.sum(positions >= 0, axis=1)
        index = jnp.arange(tokens)
        expected = jnp.where(index < count[:, None], self.lengths[:, None] + index, -1)
        fitting = jnp.all(positions == expected, axis=1) & (self.lengths + count <= self.limit)
        return fitting & (self.lengths == 0) if fresh else fitting

    def check(self, positions: Int32[Array, "batch tokens"], *, fresh: bool = False) -> None:
        """Raises if concrete positions are refused by `accepts`; does nothing while tracing.

        Raises:
            ValueError: names the first offending row and why.
        """
        if positions.shape[0] != self.batch:
            raise ValueError(f"{positions.shape[0]} rows of positions for a cache of {self.batch}")
        if isinstance(positions, jax.core.Tracer) or isinstance(self.lengths, jax.core.Tracer):
            return
        refused = np.flatnonzero(~np.asarray(self.accepts(positions, fresh=fresh)))
        if not refused.size:
            return
        row = int(refused[0])
        length = int(self.lengths[row])
        if fresh and length:
            raise ValueError(
                f"row {row} holds {length} tokens, so the cache is not fresh; leave fresh=True out"
            )
        count = int(np.sum(np.asarray(positions[row]) >= 0))
        if length + count > self.limit:
            raise ValueError(
                f"row {row} holds {length} of at most {self.limit} tokens and cannot take {count} "
                "more; initialise the cache with a larger max_length, or grow it"
            )
        raise ValueError(
            f"row {row} holds {length} tokens, so its positions must be {length}, {length + 1}, … "
            f"followed by -1 for padding; got {np.asarray(positions[row]).tolist()}"
        )

    def advance(self, positions: Int32[Array, "batch tokens"]) -> Self:
        """The cache with each row's length increased by its valid positions."""
        count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        return replace(self, lengths=self.lengths + count)

    def grow(self, max_length: int) -> Self:
        """A cache that can hold at least `max_length` tokens per row: a copy, or this one.

        Raises:
            ValueError: the model's sliding window forbids that many.
        """
        if max_length <= self.limit:
            return self
        if self.sliding_window is not None and max_length > self.sliding_window:
            raise ValueError(
                f"max_length={max_length} exceeds the model's sliding window of "
                f"{self.sliding_window} tokens"
            )
        shards = self.sequence_shards
        capacity = padded_capacity(max_length, shards)
        added = (capacity - self.capacity) // shards
        group = self.spec.keys.group if isinstance(self.spec.keys, ChannelQuantisedKeys) else 1

        def pad(array: Array | None, axis: int, amount: int) -> Array | None:
            if array is None:
                return None
            shape = array.shape
            parts = (shards, shape[axis] // shards)
            widths = [(0, amount if axis + 1 == index else 0) for index in range(5)]
            grown = jnp.pad(array.reshape(*shape[:axis], *parts, *shape[axis + 1 :]), widths)
            return grown.reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return replace(
            self,
            key_words=pad(self.key_words, 3, added),
            key_scales=pad(self.key_scales, 3, added // 2),
            key_groups=pad(self.key_groups, 3, added // group),
            keys=pad(self.keys, 2, added),
            value_words=pad(self.value_words, 3, added),
            value_affine=pad(self.value_affine, 3, added),
            values=pad(self.values, 2, added),
            capacity=capacity,
        )
