"""Generation on the device: prefill in buckets, then one `while_loop` of decode steps.

Token ids in, token ids out; text, prompts and defaults are `h1bjax.model`'s.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from h1bjax.cache import KVCache, choose_prefill
from h1bjax.compile import jit_decoding
from h1bjax.decoder import Decoder
from h1bjax.sampling import Sampling, row_keys, sample
from h1bjax.sharding import place_rows, to_host
from h1bjax.stopping import StopStrings

PREFILL_CHUNK = 1024
"""Prompts longer than this many tokens are read in chunks of as many, where scores are held."""

PREFILL_TOKENS = 65536
"""The most tokens of a whole batch that fused attention reads at once, for their activations."""

SMALLEST_BUCKET = 16
"""Prompts, output buffers and stop-id lists are padded to at least this, so few shapes compile."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Control:
    """What steers a generation besides the model. All traced: changing it does not recompile.

    Attributes:
        sampling: how the next token is chosen.
        stop_ids: token ids that end a row, padded with -1.
        stop_strings: texts that end a row.
        key: the randomness of the whole generation.
        limit: the most tokens a row may get.
    """

    sampling: Sampling
    stop_ids: Int32[Array, "stop_ids"]
    stop_strings: StopStrings
    key: Key[Array, ""]
    limit: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where a generation stands between two steps.

    Attributes:
        cache: holds every token so far, the stop tokens included.
        logits: of each row's next token.
        tokens: the new tokens, -1 beyond them; stop ids are left out.
        logprobs: natural log-probabilities of the new tokens under the model's own
            distribution, before temperature and filters.
        text_state: how far each row's new text has matched a stop string.
        done: rows that have stopped.
        failed: rows that have stopped because their logits were not finite.
        step: steps taken.
    """

    cache: KVCache
    logits: Float[Array, "batch vocab"]
    tokens: Int32[Array, "batch buffer"]
    logprobs: Float[Array, "batch buffer"]
    text_state: Int32[Array, "batch"]
    done: Bool[Array, "batch"]
    failed: Bool[Array, "batch"]
    step: Int32[Array, ""]

    @classmethod
    def start(
        cls,
        cache: KVCache,
        logits: Float[Array, "batch vocab"],
        stop_strings: StopStrings,
        max_new_tokens: int,
        *,
        rows: int | None = None,
        mesh: Mesh | None = None,
    ) -> Self:
        """The state after prefill, with room for `max_new_tokens`.

        Only the first `rows` generate, by default all; others fill up a batch that a mesh divides.
        """
        batch = logits.shape[0]
        shape = (batch, bucket_size(max_new_tokens))
        fresh = {
            "tokens": jnp.full(shape, -1, jnp.int32),
            "logprobs": jnp.zeros(shape, jnp.float32),
            "text_state": stop_strings.initial(batch),
            "done": jnp.arange(batch) >= (batch if rows is None else rows),
            "failed": jnp.zeros(batch, bool),
            "step": jnp.int32(0),
        }
        # As later states lie, for which nothing is compiled again.
        return cls(cache=cache, logits=logits, **place_rows(mesh, fresh))


def bucket_size(length: int) -> int:
    """The power of two, at least 16, that `length` is padded to."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def prefill_width(length: int) -> int:
    """What a chunk of `length` tokens is padded to, by at most a seventh where it is long."""
    step = max(bucket_size(length) // 8, SMALLEST_BUCKET)
    return bucket_size(length) if length <= PREFILL_CHUNK else -(-length // step) * step


def stop_id_array(ids: tuple[int, ...]) -> Int32[Array, "stop_ids"]:
    """Stop ids padded with -1 to a bucket."""
    return jnp.asarray([*ids, *[-1] * (bucket_size(len(ids)) - len(ids))], jnp.int32)


def prefill(
    decoder: Decoder, prompts: list[list[int]], cache: KVCache, *, exact: bool = False
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Reads ragged prompts into the cache.

    Args:
        decoder: the model.
        prompts: token ids of each row; a row without any takes part in nothing.
        cache: empty, or holding earlier turns; donated.
        exact: whether prompts attend to themselves exactly, in one chunk, and only earlier turns
            are read from the compressed store.

    Returns:
        The logits after each row's last token, and the cache.
    """
    longest = max(len(prompt) for prompt in prompts)
    lengths = to_host(cache.lengths)
    hidden = jnp.zeros((len(prompts), decoder.config.hidden_size), decoder.dtype)
    fused = not lengths.any() and _runs_fused(decoder, cache, exact)
    begin = 0
    while begin < longest:
        fresh = fused and begin == 0
        chunk = PREFILL_CHUNK
        if exact:
            chunk = longest
        elif fresh:
            chunk = max(PREFILL_TOKENS // len(prompts), PREFILL_CHUNK)
        width = prefill_width(min(chunk, longest - begin))
        tokens = np.zeros((len(prompts), width), np.int32)
        positions = np.full((len(prompts), width), -1, np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[begin : begin + chunk]
            tokens[row, : len(part)] = part
            positions[row, : len(part)] = lengths[row] + begin + np.arange(len(part))
        hidden, cache = _prefill_chunk(
            decoder, tokens, positions, cache, hidden, exact=exact, fresh=fresh
        )
        begin += chunk
    return _logits(decoder, hidden), cache


def _runs_fused(decoder: Decoder, cache: KVCache, exact: bool) -> bool:
    choice = choose_prefill(cache.spec, decoder.dtype, cache.head_dim, exact=exact)
    return choice.implementation == "cudnn"


@partial(jax.jit, donate_argnames=("cache", "hidden"), static_argnames=("exact", "fresh"))
def _prefill_chunk(
    decoder: Decoder,
    tokens: Int[Array, "batch tokens"],
    positions: Int[Array, "batch tokens"],
    cache: KVCache,
    hidden: Float[Array, "batch embed"],
    *,
    exact: bool,
    fresh: bool,
) -> tuple[Float[Array, "batch embed"], KVCache]:
    """Keeps the hidden state of each row's last token, whichever chunk that is in."""
    outputs, new_cache = decoder.hidden(tokens, positions, cache, exact_prefill=exact, fresh=fresh)
    assert new_cache is not None
    count = jnp.sum(positions >= 0, axis=1)
    last = jnp.take_along_axis(outputs, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((count > 0)[:, None], last, hidden), new_cache


@jax.jit
def _logits(decoder: Decoder, hidden: Float[Array, "batch embed"]) -> Float[Array, "batch vocab"]:
    return decoder.logits(hidden)


@jit_decoding(donate_argnames="state")
def decode(decoder: Decoder, state: DecodeState, control: Control) -> DecodeState:
    """Takes steps until every row has stopped or the limit is reached. Donates `state`."""

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < control.limit) & ~jnp.all(state.done)

    return jax.lax.while_loop(unfinished, lambda state: _step(decoder, state, control), state)


@jit_decoding(donate_argnames="state")
def decode_step(decoder: Decoder, state: DecodeState, control: Control) -> DecodeState:
    """One step of `decode`, for streaming. Donates `state`."""
    return _step(decoder, state, control)


def _step(decoder: Decoder, state: DecodeState, control: Control) -> DecodeState:
    """Chooses each unfinished row's next token and feeds it, so that the cache holds it too."""
    batch = state.done.shape[0]
    token = sample(state.logits, control.sampling, row_keys(control.key, batch, state.step))
    failed = ~state.done & (token < 0)
    running = ~state.done & ~failed
    is_stop = jnp.any(token[:, None] == control.stop_ids, axis=1)
    written = running & ~is_stop
    text_state = jnp.where(
        written, control.stop_strings.advance(state.text_state, token), state.text_state
    )
    logprobs = jax.nn.log_softmax(state.logits.astype(jnp.float32), axis=-1)
    logprob = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]

    fed = jnp.where(running, token, 0)[:, None]
    positions = jnp.where(running, state.cache.lengths, -1)[:, None]
    logits, cache = decoder(fed, positions, state.cache)
    assert cache is not None
    return replace(
        state,
        cache=cache,
        logits=jnp.where(running[:, None], logits[:, 0], state.logits),
        tokens=state.tokens.at[:, state.step].set(jnp.where(written, token, -1)),
        logprobs=state.logprobs.at[:, state.step].set(jnp.where(written, logprob, 0.0)),
        text_state=text_state,
        done=~running | is_stop | control.stop_strings.matched(text_state),
        failed=state.failed | failed,
        step=state.step + 1,
    )
