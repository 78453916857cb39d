"""Fits caches to a model: one pass over sample text, one layer at a time, without gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, Int64, Key
from tqdm import tqdm

from h1bjax.cache import CacheSpec, CodecParameters, random_rotation
from h1bjax.cache.dense import sketched_logits
from h1bjax.cache.fitting.sample import KeySample
from h1bjax.cache.fitting.temperature import fit_temperature
from h1bjax.decoder import Decoder
from h1bjax.rope import rope_frequencies
from h1bjax.tokenizer import Tokenizer
from pallas_kernels.exact_attention.reference import exact_logits
from pallas_kernels.rotary import rotate

KEYS = 32768
"""Keys of each KV head that codecs are fitted to, drawn from all windows."""

ATTENTION_WINDOWS = 16
"""Windows in which attention is looked at."""

QUERIES = 128
"""Query positions looked at in each of these windows."""

_PIECE = 16
"""Characters per token of a window that are tokenised at a time."""


@dataclass(frozen=True)
class Calibration:
    """A cache fitted to a model.

    Attributes:
        spec: what it was made for.
        codec: parameters of the key codec, stacked over layers; None where keys have none.
        rotation: of the values, to be folded into the weights; None where they are not rotated.
    """

    spec: CacheSpec
    codec: CodecParameters | None
    rotation: Float[Array, "layers kv_heads head_dim head_dim"] | None


def calibration_windows(
    tokenizer: Tokenizer, documents: Sequence[str], *, context: int, tokens: int, seed: int
) -> Int32[np.ndarray, "windows context"]:
    """Windows of tokens from random places of the documents.

    Pieces of the text are put in a random order and read as one stream. Where the tokenizer adds
    a BOS, each window begins with one.

    Args:
        tokenizer: the model's.
        documents: sample text; special tokens written out in it become their ids.
        context: tokens of a window.
        tokens: how many to take, rounded down to whole windows; fewer if the text has fewer.
        seed: of the choice.

    Raises:
        ValueError: the text is shorter than one window, or `tokens` is; a window of less than
            two tokens.
    """
    if context < 2:
        raise ValueError(f"context={context} must be at least 2 tokens")
    if tokens < context:
        raise ValueError(f"{tokens} tokens are fewer than one window of {context}")
    length = _PIECE * context
    pieces = [
        document[begin : begin + length]
        for document in documents
        for begin in range(0, len(document), length)
    ]
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    before = [] if bos is None else [bos]
    body = context - len(before)
    wanted = tokens // context * body
    parts, count = [np.zeros(0, np.int32)], 0
    for index in np.random.default_rng(seed).permutation(len(pieces)):
        parts.append(np.asarray(tokenizer.encode_plain(pieces[index]), np.int32))
        count += len(parts[-1])
        if count >= wanted:
            break
    stream = np.concatenate(parts)[:wanted]
    windows = len(stream) // body
    if windows == 0:
        raise ValueError(
            f"the text has {len(stream)} tokens, fewer than one window of {context}; give more "
            "text or a smaller context"
        )
    rows = stream[: windows * body].reshape(windows, body)
    return np.concatenate([np.tile(np.array(before, np.int32), (windows, 1)), rows], axis=1).astype(
        np.int32
    )


def calibrate(
    decoder: Decoder,
    windows: Int32[np.ndarray, "windows context"],
    specs: Sequence[CacheSpec],
    *,
    seed: int = 0,
    batch: int = 4,
) -> list[Calibration]:
    """Fits caches to a model.

    The text passes through the layers once, with exact attention, and codecs are fitted to the
    queries and keys of each layer as it passes. Besides the weights, the device holds the
    activations of one layer and a sample of its keys; the host holds the residual stream.

    Args:
        decoder: the model's weights, with the exact cache.
        windows: sample text, see `calibration_windows`.
        specs: the caches; those that share a codec are fitted together.
        seed: of rotations and of the choice of keys and queries.
        batch: windows that pass through a layer at a time.

    Raises:
        ValueError: an argument is invalid, or the windows are too short for a cache's window.
        FloatingPointError: the model's keys or queries are not finite.
    """
    config = decoder.config
    _check(decoder, windows, specs, batch)
    sketches = list(dict.fromkeys(_sketch(spec) for spec in specs if spec.sketch is not None))
    exact_tokens = max((sketch.exact_tokens for sketch in sketches), default=0)
    places = _Places.draw(seed, len(windows), windows.shape[1], exact_tokens)
    rng = jax.random.key(seed)
    fitted: dict[CacheSpec, list[CodecParameters]] = {sketch: [] for sketch in sketches}
    chunks = [windows[begin : begin + batch] for begin in range(0, len(windows), batch)]
    layers = config.num_layers if sketches else 0
    # disable=None shows the bar on a terminal only.
    with tqdm(
        total=layers * (len(chunks) + len(sketches)), desc="Calibrating", disable=None
    ) as progress:
        stream = [np.asarray(decoder.embed(chunk)) for chunk in chunks] if sketches else []
        frequencies = jnp.asarray(rope_frequencies(config))
        for layer in range(layers):
            stream, sample = _trace(decoder, layer, stream, places, progress)
            if not bool(jnp.isfinite(sample.query).all() & jnp.isfinite(sample.keys).all()):
                raise FloatingPointError(
                    f"the queries or keys of layer {layer} are not finite; the weights may "
                    "overflow in this dtype"
                )
            # The same for all, so that no fit depends on the other caches in the call.
            own = jax.random.fold_in(rng, layer)
            for sketch in sketches:
                fitted[sketch].append(_fit_layer(sketch, own, sample, frequencies))
                progress.update(1)
    rotation = random_rotation(
        jax.random.fold_in(rng, config.num_layers),
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
    )
    return [
        Calibration(
            spec,
            None if spec.sketch is None else _stack(fitted[_sketch(spec)]),
            rotation if spec.values is not None and spec.values.rotated else None,
        )
        for spec in specs
    ]


@dataclass(frozen=True, eq=False)
class _Places:
    """Where in the windows keys and queries are looked at.

    Attributes:
        keys: positions whose keys are taken, of every window.
        queries: positions whose queries are taken, in order, of the first windows.
        windows: how many windows these are.
    """

    keys: Int64[np.ndarray, "sampled"]
    queries: Int64[np.ndarray, "queries"]
    windows: int

    @classmethod
    def draw(cls, seed: int, windows: int, context: int, exact_tokens: int) -> "_Places":
        generator = np.random.default_rng(seed)
        keys = generator.choice(context, min(context, -(-KEYS // windows)), replace=False)
        # Earlier queries read no sketch at all.
        late = context - exact_tokens
        queries = exact_tokens + generator.choice(late, min(late, QUERIES), replace=False)
        return cls(np.sort(keys), np.sort(queries), min(windows, ATTENTION_WINDOWS))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _LayerSample:
    """What is kept of a layer, float32.

    Attributes:
        sampled_keys: keys from all windows.
        sampled_positions: their positions.
        query: queries of some windows at some positions.
        query_positions: these positions.
        keys: all keys of these windows.
    """

    sampled_keys: Float[Array, "samples kv_heads head_dim"]
    sampled_positions: Int32[Array, "samples"]
    query: Float[Array, "windows queries heads head_dim"]
    query_positions: Int32[Array, "queries"]
    keys: Float[Array, "windows tokens kv_heads head_dim"]


def _check(decoder: Decoder, windows: np.ndarray, specs: Sequence[CacheSpec], batch: int) -> None:
    if not decoder.spec.exact:
        raise ValueError(f"calibrate a decoder with the exact cache, not {decoder.spec.name!r}")
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    if windows.ndim != 2 or not windows.size:
        raise ValueError(f"windows must be a non-empty matrix of token ids, not {windows.shape}")
    context, limit = windows.shape[1], decoder.config.sliding_window
    if limit is not None and context > limit:
        raise ValueError(
            f"windows of {context} tokens exceed the model's sliding window of {limit}, which "
            "this decoder does not implement"
        )
    lowest, highest, known = windows.min(), windows.max(), decoder.config.vocab_size
    if lowest < 0 or highest >= known:
        raise ValueError(f"token ids from {lowest} to {highest} exceed the vocabulary of {known}")
    for spec in specs:
        spec.check_head_dim(decoder.config.head_dim)
        if windows.shape[1] <= spec.exact_tokens:
            raise ValueError(
                f"windows of {windows.shape[1]} tokens lie within the {spec.exact_tokens} that "
                f"the cache {spec.name!r} keeps exactly; calibrate with a longer context"
            )


def _sketch(spec: CacheSpec) -> CacheSpec:
    """The part of a spec that the fit of its key codec depends on."""
    return replace(spec, name="sketch", values=None)


def _stack(layers: Sequence[CodecParameters]) -> CodecParameters:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def _trace(
    decoder: Decoder,
    layer: int,
    stream: Sequence[np.ndarray],
    places: _Places,
    progress: tqdm,
) -> tuple[list[np.ndarray], _LayerSample]:
    """Takes the residual stream through one layer, and samples the layer."""
    after, sampled, queries, attended = [], [], [], []
    missing = places.windows
    for chunk in stream:
        x, query, keys = decoder.trace_layer(jnp.int32(layer), chunk)
        after.append(np.asarray(x))
        sampled.append(keys[:, places.keys].astype(jnp.float32))
        if missing > 0:
            queries.append(query[:missing, places.queries].astype(jnp.float32))
            attended.append(keys[:missing].astype(jnp.float32))
            missing -= len(queries[-1])
        progress.update(1)
    positions = np.tile(places.keys, sum(map(len, sampled)))
    return after, _LayerSample(
        sampled_keys=rearrange(jnp.concatenate(sampled), "w t k d -> (w t) k d"),
        sampled_positions=jnp.asarray(positions, jnp.int32),
        query=jnp.concatenate(queries),
        query_positions=jnp.asarray(places.queries, jnp.int32),
        keys=jnp.concatenate(attended),
    )


@partial(jax.jit, static_argnames="spec")
def _fit_layer(
    spec: CacheSpec,
    rng: Key[Array, ""],
    sample: _LayerSample,
    frequencies: Float[Array, "half_dim"],
) -> CodecParameters:
    codec = spec.sketch
    assert codec is not None
    keys = sample.sampled_keys
    if spec.rope_period is not None:
        block = sample.sampled_positions - sample.sampled_positions % spec.rope_period
        keys = rotate(keys, -block[:, None], frequencies)
    moment = _query_moment(spec, sample, frequencies)
    key_sample = KeySample(rearrange(keys, "n k d -> k n d"), moment)
    heads = sample.query.shape[2]
    parameters = codec.fit(rng, key_sample, heads)
    if spec.scores != "fitted":
        return parameters
    causal, stored = _visible(spec, sample)
    raw = replace(spec, scores="raw")
    positions = jnp.arange(sample.keys.shape[1], dtype=jnp.int32)[None]

    def logits(window: tuple[Array, Array]) -> tuple[Array, Array]:
        query, keys = (array[None] for array in window)
        sketched = sketched_logits(raw, codec, parameters, query, keys, positions, frequencies)
        exact = exact_logits(query, jnp.moveaxis(keys, 2, 1))
        return _by_query_head(exact), _by_query_head(sketched)

    exact, sketched = jax.lax.map(logits, (sample.query, sample.keys))
    return parameters.with_scores(*fit_temperature(exact, sketched, causal, stored))


def _query_moment(
    spec: CacheSpec, sample: _LayerSample, frequencies: Float[Array, "half_dim"]
) -> Float[Array, "kv_heads head_dim head_dim"]:
    """Mean of `q qᵀ` over the queries and the keys that they read sketched.

    A pair counts `p·(1 - p)` where the query gives the key the weight p, because that is how
    much the weight changes with the logit. With a finite RoPE period, q is turned back by the
    beginning of the key's block.
    """
    causal, stored = _visible(spec, sample)
    tokens, kv_heads = sample.keys.shape[1:3]
    period = spec.rope_period
    padding = 0 if period is None else -tokens % period

    def window(arrays: tuple[Array, Array]) -> tuple[Array, Array]:
        query, keys = arrays
        logits = exact_logits(query[None], jnp.moveaxis(keys, 1, 0)[None])[0]
        weight = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1)
        weight = jnp.where(stored, weight * (1 - weight), 0.0)
        grouped = rearrange(query, "q (k g) d -> k g q d", k=kv_heads)
        if period is None:
            turned, weight = grouped[..., None, :], jnp.sum(weight, axis=-1, keepdims=True)
        else:
            begin = jnp.arange(0, tokens, period, dtype=jnp.int32)
            turned = rotate(grouped[..., None, :], -begin, frequencies)
            weight = jnp.pad(weight, ((0, 0), (0, 0), (0, 0), (0, padding)))
            weight = jnp.sum(rearrange(weight, "k g q (b t) -> k g q b t", t=period), axis=-1)
        rows = rearrange(turned, "k g q b d -> k (g q b) d")
        weights = rearrange(weight, "k g q b -> k (g q b)")
        moment = jnp.einsum(
            "kn,knd,kne->kde", weights, rows, rows, precision=jax.lax.Precision.HIGHEST
        )
        return moment, jnp.sum(weights, axis=1)

    moments, weights = jax.lax.map(window, (sample.query, sample.keys))
    total = jnp.sum(weights, axis=0)[:, None, None]
    return jnp.sum(moments, axis=0) / jnp.where(total > 0, total, 1.0)


def _visible(
    spec: CacheSpec, sample: _LayerSample
) -> tuple[Bool[Array, "queries keys"], Bool[Array, "queries keys"]]:
    """Which keys each query sees at all, and which of them it reads from their sketch."""
    t, n = sample.query_positions[:, None], jnp.arange(sample.keys.shape[1], dtype=jnp.int32)
    causal = n <= t
    return causal, causal & (n >= spec.sinks) & (n <= t - spec.window)


def _by_query_head(
    logits: Float[Array, "1 kv_heads groups queries keys"],
) -> Float[Array, "heads queries keys"]:
    return rearrange(logits, "1 k g q n -> (k g) q n")
