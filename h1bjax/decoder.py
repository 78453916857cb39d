"""The Llama-family decoder: a pure function of its parameters, tokens, positions and a cache."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Key

from h1bjax.cache import (
    CacheSpec,
    CodecParameters,
    KVCache,
    append_and_attend,
    dense_attention,
    training_attention,
)
from h1bjax.cache.prepared import PreparedCodec
from h1bjax.cache.sharded import init_sharded, sharded_append_and_attend
from h1bjax.config import LlamaConfig
from h1bjax.fused_attention import causal_attention
from h1bjax.merged_attention import SAVED
from h1bjax.parameters import decoder_parameters
from h1bjax.rope import rope_frequencies
from h1bjax.sharding import SEQUENCE, check_mesh, place_by_heads, spread_rows
from pallas_kernels.rotary import Turn, rotate_by, turn

EXACT = CacheSpec.preset("exact")


class DecoderLayers(nnx.Module):
    """Parameters of all layers, each stacked on a leading layers axis.

    Attributes are those that `h1bjax.parameters.decoder_parameters` marks as stacked; those
    which a model family lacks are None.
    """

    def __init__(self, parameters: Mapping[str, Array]):
        def optional(name: str) -> nnx.Param | None:
            return nnx.Param(parameters[name]) if name in parameters else None

        self.attention_norm = nnx.Param(parameters["attention_norm"])
        self.query = nnx.Param(parameters["query"])
        self.key = nnx.Param(parameters["key"])
        self.value = nnx.Param(parameters["value"])
        self.output = nnx.Param(parameters["output"])
        self.query_bias = optional("query_bias")
        self.key_bias = optional("key_bias")
        self.value_bias = optional("value_bias")
        self.output_bias = optional("output_bias")
        self.query_norm = optional("query_norm")
        self.key_norm = optional("key_norm")
        self.mlp_norm = nnx.Param(parameters["mlp_norm"])
        self.gate = nnx.Param(parameters["gate"])
        self.up = nnx.Param(parameters["up"])
        self.down = nnx.Param(parameters["down"])
        self.gate_bias = optional("gate_bias")
        self.up_bias = optional("up_bias")
        self.down_bias = optional("down_bias")


class Decoder(nnx.Module):
    """A Llama-family decoder whose attention reads a key-value cache.

    It holds only parameters, so it is a pytree: jit it, differentiate it, shard it. Layers run
    under `lax.scan`. Norms, RoPE angles and softmax are float32, the rest has the dtype of the
    layers' matrices. Embedding, unembedding and norm weights may be wider: they are used in that
    dtype and their gradients, sums over many tokens, are accumulated in their own.

    Attributes:
        embedding: `[vocab, embed]`; also the unembedding of tied models.
        layers: the stacked layers.
        final_norm: `[embed]`.
        unembedding: `[embed, vocab]`, None for tied models.
        codec: parameters of the key codec that `spec` names; None for exact keys.
        config: shape and arithmetic of the model. Static.
        spec: the cache that `codec` was made for. Static.
        mesh: what everything is divided over; None for one device. Static.
    """

    def __init__(
        self,
        config: LlamaConfig,
        parameters: Mapping[str, Array],
        spec: CacheSpec = EXACT,
        codec: CodecParameters | None = None,
        mesh: Mesh | None = None,
    ):
        """Builds the decoder around existing arrays.

        Args:
            config: the model's.
            parameters: what `decoder_parameters(config)` lists, stacked.
            spec: the cache to decode with.
            codec: its parameters, see `init_codec`.
            mesh: what the parameters are divided over, see `h1bjax.sharding`; the codec is divided
                here.

        Raises:
            ValueError: parameters are missing, unexpected or misshapen (all are listed), the spec
                sketches keys and there is no codec, or the mesh does not suit the model.
        """
        _check_parameters(config, parameters)
        if mesh is not None:
            check_mesh(mesh, config)
        if (spec.sketch is None) != (codec is None):
            wanted = "needs codec parameters" if codec is None else "takes no codec parameters"
            raise ValueError(f"cache spec {spec.name!r} {wanted}")
        self.embedding = nnx.Param(parameters["embedding"])
        self.layers = DecoderLayers(parameters)
        self.final_norm = nnx.Param(parameters["final_norm"])
        tied = config.tie_word_embeddings
        self.unembedding = None if tied else nnx.Param(parameters["unembedding"])
        self.codec = place_by_heads(mesh, codec)
        self.config = config
        self.spec = spec
        self.mesh = mesh

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return self.layers.query[...].dtype

    def __call__(
        self,
        tokens: Int32[Array, "batch tokens"],
        positions: Int32[Array, "batch tokens"] | None,
        cache: KVCache | None = None,
        *,
        exact_prefill: bool = False,
        fresh: bool = False,
        compressed: bool = False,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch tokens vocab"], KVCache | None]:
        """Logits of the next token at every position, and the cache with these tokens appended.

        Rows are right-padded with position -1. With a cache, valid positions continue each row's
        length; a row whose positions do not, or do not fit, raises if the arrays are concrete.
        While tracing it is left unwritten and its logits are NaN. Token ids outside the
        vocabulary give NaN too.

        Args:
            tokens: token ids.
            positions: position of each token in its row. None stands for rows without padding
                that begin at 0, which is possible only without a cache; attention then runs
                fused, see `h1bjax.fused_attention` and `h1bjax.cache.training_attention`.
            cache: holds the tokens before these; None attends among these tokens alone.
            exact_prefill: whether tokens read their own chunk exactly, and only older tokens
                from the compressed store.
            fresh: whether the caller knows that the cache holds no tokens. A prompt then runs
                through fused attention where that is possible, see
                `h1bjax.cache.choose_prefill`; rows that do hold tokens are refused.
            compressed: without a cache, attend as through a fresh cache of `spec`, with
                straight-through gradients where there are no positions; otherwise attention
                without a cache is exact.
            remat: without a cache, whether a gradient keeps only the results of each layer's
                matrix products and compressed attention, and computes the rest of it again.

        Raises:
            ValueError: the cache is of another spec or batch, or refuses the positions; there
                are no positions where they are needed; more tokens than the model's sliding
                window without a cache.
        """
        hidden, cache = self.hidden(
            tokens,
            positions,
            cache,
            exact_prefill=exact_prefill,
            fresh=fresh,
            compressed=compressed,
            remat=remat,
        )
        return self.logits(hidden), cache

    def hidden(
        self,
        tokens: Int32[Array, "batch tokens"],
        positions: Int32[Array, "batch tokens"] | None,
        cache: KVCache | None = None,
        *,
        exact_prefill: bool = False,
        fresh: bool = False,
        compressed: bool = False,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch tokens embed"], KVCache | None]:
        """The final hidden states, from which `logits` makes logits. See `__call__`."""
        if positions is None:
            if cache is not None:
                raise ValueError(
                    "a cache needs positions; leaving them out is for attention without a cache"
                )
        elif tokens.shape != positions.shape:
            raise ValueError(f"tokens {tokens.shape} and positions {positions.shape} must agree")
        if cache is None:
            window = self.config.sliding_window
            if window is not None and tokens.shape[1] > window:
                raise ValueError(
                    f"{tokens.shape[1]} tokens exceed the model's sliding window of {window}, "
                    "which this decoder does not implement"
                )
        else:
            assert positions is not None
            self.check_cache(cache)
            cache.check(positions, fresh=fresh)
        return self._hidden(
            tokens,
            positions,
            cache,
            exact_prefill=exact_prefill,
            fresh=fresh,
            compressed=compressed,
            remat=remat,
        )

    def logits(self, hidden: Float[Array, "*rows embed"]) -> Float[Array, "*rows vocab"]:
        """Float32 logits of final hidden states."""
        return unembed(hidden, self.unembedding_matrix())

    def unembedding_matrix(self) -> Float[Array, "embed vocab"]:
        """What takes hidden states to logits; of tied models, the embedding transposed."""
        return self.embedding[...].T if self.unembedding is None else self.unembedding[...]

    @jax.jit
    def layer_outputs(
        self, tokens: Int32[Array, "batch tokens"], positions: Int32[Array, "batch tokens"]
    ) -> Float[Array, "embedding_and_layers batch tokens embed"]:
        """The embedded tokens, then the residual stream after each layer, with exact attention."""
        embedded = self._embed(tokens, positions)
        attend = self._dense(positions, EXACT)

        def step(x: Array, layer: DecoderLayers) -> tuple[Array, Array]:
            x, _ = self._layer(layer, None, x, self._turn(positions), attend)
            return x, x

        _, outputs = jax.lax.scan(step, embedded, self.layers)
        return jnp.concatenate([embedded[None], outputs])

    @jax.jit
    def embed(self, tokens: Int32[Array, "batch tokens"]) -> Float[Array, "batch tokens embed"]:
        """The residual stream before the first layer, of rows without padding."""
        return self._embed(tokens, jnp.zeros((1, 1), jnp.int32))

    @jax.jit
    def trace_layer(
        self, index: Int32[Array, ""], x: Float[Array, "batch tokens embed"]
    ) -> tuple[
        Float[Array, "batch tokens embed"],
        Float[Array, "batch tokens heads head_dim"],
        Float[Array, "batch tokens kv_heads head_dim"],
    ]:
        """One layer with exact attention over whole rows, and what its attention compares.

        Args:
            index: which layer.
            x: the residual stream before it.

        Returns:
            The residual stream after it; its queries; its keys. Both are after RoPE.
        """
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]

        def attend(
            codec: CodecParameters | None, query: Array, key: Array, value: Array
        ) -> tuple[Array, tuple[Array, Array]]:
            return causal_attention(query, key, value), (query, key)

        layer = jax.tree.map(lambda stacked: stacked[index], self.layers)
        x, (query, key) = self._layer(layer, None, x, self._turn(positions), attend)
        return x, query, key

    def init_cache(self, *, batch: int, max_length: int) -> KVCache:
        """An empty cache of this decoder's spec and dtype. See `KVCache.init`."""
        sizes: dict[str, Any] = {
            "batch": batch,
            "max_length": max_length,
            "dtype": self.dtype,
        }
        if self.mesh is not None:
            return init_sharded(self.mesh, self.config, self.spec, **sizes)
        return KVCache.init(self.config, self.spec, **sizes)

    def parameters(self) -> dict[str, Array]:
        """The arrays that this decoder was built from, by name; without the codec's."""
        return {
            name: getattr(self.layers if info.stacked else self, name)[...]
            for name, info in decoder_parameters(self.config).items()
        }

    def _embed(
        self, tokens: Int32[Array, "batch tokens"], positions: Int32[Array, "#batch tokens"]
    ) -> Float[Array, "batch tokens embed"]:
        # Indexing alone would silently read the last row for an id beyond the vocabulary. Padding
        # may hold any id, and must stay finite: its values are weighted with zero.
        known = (tokens >= 0) & (tokens < self.config.vocab_size)
        instead = jnp.where(positions < 0, 0.0, jnp.nan)[..., None].astype(self.dtype)
        found = self.embedding[...][tokens].astype(self.dtype)
        return jnp.where(known[..., None], found, instead)

    # Compiled here, so that calls outside of any jit do not compile the layers again each time.
    @partial(jax.jit, static_argnames=("exact_prefill", "fresh", "compressed", "remat"))
    def _hidden(
        self,
        tokens: Int32[Array, "batch tokens"],
        positions: Int32[Array, "batch tokens"] | None,
        cache: KVCache | None,
        *,
        exact_prefill: bool,
        fresh: bool,
        compressed: bool,
        remat: bool,
    ) -> tuple[Float[Array, "batch tokens embed"], KVCache | None]:
        attend: _Attend = _attend_fused
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            if compressed:
                attend = self._trained(positions)
        elif cache is None:
            attend = self._dense(positions, self.spec if compressed else EXACT)
        x = spread_rows(self.mesh, self._embed(tokens, positions))
        if cache is None:
            x = self._without_cache(x, positions, attend, remat)
        else:
            accepted = cache.accepts(positions, fresh=fresh)[:, None]
            positions = jnp.where(accepted, positions, -1)
            x, cache = self._with_cache(x, positions, cache, exact_prefill, fresh)
            cache = cache.advance(positions)
            x = jnp.where(accepted[..., None], x, jnp.nan)
        return _rms_norm(x, self.final_norm, self.config.rms_norm_eps), cache

    def _without_cache(
        self,
        x: Float[Array, "batch tokens embed"],
        positions: Int32[Array, "#batch tokens"],
        attend: "_Attend",
        remat: bool,
    ) -> Float[Array, "batch tokens embed"]:
        turned = self._turn(positions)

        def step(x: Array, layer: tuple[DecoderLayers, CodecParameters | None]) -> tuple:
            return self._layer(*layer, x, turned, attend)

        if remat:
            # Inside a scan nothing can be merged with the first computation of the layer.
            step = jax.checkpoint(
                step,
                prevent_cse=False,
                policy=jax.checkpoint_policies.save_from_both_policies(
                    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                    jax.checkpoint_policies.save_only_these_names(SAVED),
                ),
            )
        return jax.lax.scan(step, x, (self.layers, self.codec))[0]

    def _with_cache(
        self,
        x: Float[Array, "batch tokens embed"],
        positions: Int32[Array, "batch tokens"],
        cache: KVCache,
        exact_prefill: bool,
        fresh: bool,
    ) -> tuple[Float[Array, "batch tokens embed"], KVCache]:
        frequencies, turned = self._frequencies(), self._turn(positions)
        prepared = PreparedCodec.of(cache.spec, self.codec)
        append = append_and_attend
        if self.mesh is not None:
            append = partial(sharded_append_and_attend, self.mesh)

        def step(carry: tuple[Array, Array, KVCache], layer: tuple) -> tuple[tuple, None]:
            index, x, cache = carry
            weights, codec = layer

            def attend(
                codec: CodecParameters | None, query: Array, key: Array, value: Array
            ) -> tuple[Array, KVCache]:
                return append(
                    cache,
                    index,
                    query,
                    key,
                    value,
                    positions,
                    codec,
                    frequencies,
                    exact_chunk=exact_prefill,
                    fresh=fresh,
                    prepared=prepared,
                )

            x, cache = self._layer(weights, codec, x, turned, attend)
            return (index + 1, spread_rows(self.mesh, x), cache), None

        # The stacked cache is the carry, so that each layer writes into it where it lies; so is the
        # layer's number, which would have to be copied out of an array of numbers.
        (_, x, cache), _ = jax.lax.scan(step, (jnp.int32(0), x, cache), (self.layers, self.codec))
        return x, cache

    def _dense(self, positions: Int32[Array, "batch tokens"], spec: CacheSpec) -> "_Attend":
        frequencies = self._frequencies()

        def attend(
            codec: CodecParameters | None, query: Array, key: Array, value: Array
        ) -> tuple[Array, None]:
            return (
                dense_attention(spec, query, key, value, positions, codec, frequencies),
                None,
            )

        return attend

    def _trained(self, positions: Int32[Array, "1 tokens"]) -> "_Attend":
        frequencies = self._frequencies()

        def attend(
            codec: CodecParameters | None, query: Array, key: Array, value: Array
        ) -> tuple[Array, None]:
            attended = training_attention(
                self.spec, query, key, value, positions, codec, frequencies
            )
            return attended, None

        return attend

    def _layer(
        self,
        layer: DecoderLayers,
        codec: CodecParameters | None,
        x: Float[Array, "batch tokens embed"],
        turned: Turn,
        attend: "_Attend",
    ) -> tuple[Float[Array, "batch tokens embed"], Any]:
        """One layer; `attend` gives the attention output and whatever it updated.

        Args:
            layer: its parameters.
            codec: likewise of its key codec.
            x: the residual stream before it.
            turned: the RoPE of the positions, see `_turn`.
            attend: of queries and keys after RoPE, and values.
        """
        eps = self.config.rms_norm_eps
        normed = _rms_norm(x, layer.attention_norm, eps)
        query = _add(jnp.einsum("bte,ehd->bthd", normed, layer.query[...]), layer.query_bias)
        key = _add(jnp.einsum("bte,ekd->btkd", normed, layer.key[...]), layer.key_bias)
        value = _add(jnp.einsum("bte,ekd->btkd", normed, layer.value[...]), layer.value_bias)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = _rms_norm(query, layer.query_norm, eps)
            key = _rms_norm(key, layer.key_norm, eps)
        attended, updated = attend(codec, rotate_by(query, turned), rotate_by(key, turned), value)
        output = jnp.einsum("bthd,hde->bte", attended, layer.output[...])
        x = x + _add(output, layer.output_bias)

        normed = _rms_norm(x, layer.mlp_norm, eps)
        gate = _add(jnp.einsum("bte,ef->btf", normed, layer.gate[...]), layer.gate_bias)
        up = _add(jnp.einsum("bte,ef->btf", normed, layer.up[...]), layer.up_bias)
        down = jnp.einsum("btf,fe->bte", jax.nn.silu(gate) * up, layer.down[...])
        return x + _add(down, layer.down_bias), updated

    def _turn(self, positions: Int32[Array, "#batch tokens"]) -> Turn:
        """The RoPE of the heads of each position, which all layers share."""
        return turn(positions[..., None], self._frequencies())

    def _frequencies(self) -> Float[Array, "half_dim"]:
        return jnp.asarray(rope_frequencies(self.config))

    def check_cache(self, cache: KVCache) -> None:
        """Raises ValueError if the cache is of another geometry or of another codec."""
        config, ours, theirs = self.config, self.spec, cache.spec
        shards = 1 if self.mesh is None else self.mesh.shape[SEQUENCE]
        if cache.sequence_shards != shards:
            raise ValueError(
                f"the cache has {cache.sequence_shards} sequence shards and the decoder {shards}; "
                "make the cache with decoder.init_cache"
            )
        expected = (config.num_layers, config.num_kv_heads, config.head_dim)
        if (cache.layers, cache.kv_heads, cache.head_dim) != expected:
            raise ValueError(
                f"the cache has {cache.layers} layers, {cache.kv_heads} KV heads and head_dim "
                f"{cache.head_dim}, but the decoder has {expected[0]}, {expected[1]} and "
                f"{expected[2]}; make the cache with decoder.init_cache"
            )
        if theirs.sketch is None:
            return
        if (ours.keys, ours.rope_period) != (theirs.keys, theirs.rope_period):
            raise ValueError(
                f"the cache stores keys as {theirs.name!r}, but this decoder has the codec of "
                f"{ours.name!r}; make the cache with decoder.init_cache, or load the model with "
                f"cache={theirs.name!r}"
            )


_Attend = Callable[[CodecParameters | None, Array, Array, Array], tuple[Array, Any]]


def init_codec(config: LlamaConfig, spec: CacheSpec, rng: Key[Array, ""]) -> CodecParameters | None:
    """Codec parameters that need no calibration: seeded random projections, no mean.

    Returns:
        None for a spec that does not sketch keys.
    """
    if spec.sketch is None:
        return None
    return spec.sketch.init(
        rng, config.num_layers, config.num_kv_heads, config.num_heads, config.head_dim
    )


def fold_value_rotation(
    config: LlamaConfig,
    parameters: Mapping[str, Array],
    rotation: Float[Array, "layers kv_heads head_dim head_dim"],
) -> dict[str, Array]:
    """Parameters of the same function whose values are `v' = H v`.

    H goes into the value projection and its bias, its transpose into the output projection of
    every query head that reads the KV head.

    Args:
        config: the model's.
        parameters: what `decoder_parameters(config)` lists, stacked.
        rotation: an orthogonal H for each layer's KV head.
    """

    def apply(pattern: str, array: Array, rotation: Array) -> Array:
        rotated = jnp.einsum(
            pattern,
            array.astype(jnp.float32),
            rotation.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return rotated.astype(array.dtype)

    folded = dict(parameters)
    folded["value"] = apply("lekd,lkcd->lekc", parameters["value"], rotation)
    if "value_bias" in parameters:
        folded["value_bias"] = apply("lkd,lkcd->lkc", parameters["value_bias"], rotation)
    per_query_head = jnp.repeat(rotation, config.num_heads // config.num_kv_heads, axis=1)
    folded["output"] = apply("lhde,lhcd->lhce", parameters["output"], per_query_head)
    return folded


def unembed(
    hidden: Float[Array, "*rows embed"], matrix: Float[Array, "embed vocab"]
) -> Float[Array, "*rows vocab"]:
    """Float32 logits of final hidden states, multiplied in their dtype."""
    return jnp.einsum(
        "...e,ev->...v", hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _attend_fused(
    codec: CodecParameters | None, query: Array, key: Array, value: Array
) -> tuple[Array, None]:
    return causal_attention(query, key, value), None


def _check_parameters(config: LlamaConfig, parameters: Mapping[str, Array]) -> None:
    table = decoder_parameters(config)
    problems = [f"{name} is missing" for name in table if name not in parameters]
    problems += [f"{name} is not a parameter" for name in parameters if name not in table]
    for name, info in table.items():
        expected = ((config.num_layers,) if info.stacked else ()) + info.shape
        if name in parameters and parameters[name].shape != expected:
            problems.append(f"{name} has shape {parameters[name].shape}, expected {expected}")
    if problems:
        raise ValueError("decoder parameters: " + "; ".join(problems))


def _rms_norm(
    x: Float[Array, "*rows channels"], weight: nnx.Param, eps: float
) -> Float[Array, "*rows channels"]:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (weight[...] * normed.astype(x.dtype)).astype(x.dtype)


def _add(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + bias[...]
