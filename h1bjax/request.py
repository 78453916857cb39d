"""From what a user asks for to what the device runs, checked before any long work."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from h1bjax.cache import KVCache
from h1bjax.decoder import Decoder
from h1bjax.generate import Control, stop_id_array
from h1bjax.sampling import Sampling
from h1bjax.sharding import padded_rows, to_host
from h1bjax.stopping import StopStrings
from h1bjax.tokenizer import Tokenizer

Message = Mapping[str, str]
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
"""A text, token ids (an integer array too), or the messages of a chat."""


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `Model.generate`, which documents them."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Key[Array, ""] = 0
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    cache: KVCache | None = None
    max_length: int | None = None
    exact_prefill: bool = False


def encode_prompts(
    prompts: Prompt | Sequence[Prompt], tokenizer: Tokenizer | None, *, continued: bool
) -> list[list[int]]:
    """Token ids of one prompt or of several.

    Args:
        prompts: see `Prompt`.
        tokenizer: needed for text and chats.
        continued: whether the prompts follow earlier turns, so that text gets no special tokens.

    Raises:
        ValueError: there is no prompt, a prompt is empty or of another type, there is no
            tokenizer for text, or a chat is to continue earlier turns.
    """
    prompts = _as_list(prompts)
    single = isinstance(prompts, str) or (
        len(prompts) > 0 and isinstance(prompts[0], (Integral, Mapping))
    )
    rows = cast(Sequence[Prompt], [prompts] if single else prompts)
    if not rows:
        raise ValueError("there are no prompts")
    encoded = [_encode_prompt(prompt, tokenizer, continued) for prompt in rows]
    for row, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {row} is empty; every prompt needs at least one token")
    return encoded


def check_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ValueError if a token id is outside the vocabulary."""
    for row, ids in enumerate(prompts):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"prompt {row} has token ids outside the vocabulary of {vocab_size}: {outside[:5]}"
            )


def prepare_cache(
    decoder: Decoder, prompts: Sequence[Sequence[int]], options: GenerateOptions
) -> KVCache:
    """A cache with room for the prompts and the new tokens: the given one, grown, or a new one.

    Raises:
        ValueError: the given cache was consumed already or does not fit the prompts or the
            decoder, or `max_length` is too small.
    """
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={options.max_new_tokens} must be at least 1")
    cache, lengths = options.cache, [0] * len(prompts)
    # A mesh divides rows evenly; those that are added stay empty.
    rows = padded_rows(decoder.mesh, len(prompts))
    if cache is not None:
        if any(array.is_deleted() for array in jax.tree.leaves(cache)):
            raise ValueError(
                "this cache was already continued, which consumed it; use the cache of the latest "
                "output"
            )
        decoder.check_cache(cache)
        lengths = to_host(cache.lengths).tolist()
        # Rows without tokens were added to fill up a batch.
        held = sum(length > 0 for length in lengths) if rows > len(prompts) else cache.batch
        if cache.batch != rows or held > len(prompts):
            raise ValueError(f"{len(prompts)} prompts for a cache of {held} rows")
        lengths = lengths[: len(prompts)]
    needed = options.max_new_tokens + max(
        length + len(prompt) for length, prompt in zip(lengths, prompts, strict=True)
    )
    if options.max_length is not None and options.max_length < needed:
        raise ValueError(
            f"max_length={options.max_length} is too small: the longest row needs {needed} tokens, "
            f"{options.max_new_tokens} of them new"
        )
    trained = decoder.config.max_position_embeddings
    if needed > trained:
        warnings.warn(
            f"generating up to {needed} tokens with a model made for {trained}; "
            "quality will suffer beyond",
            stacklevel=4,
        )
    size = options.max_length or needed
    if cache is None:
        return decoder.init_cache(batch=rows, max_length=size)
    return cache.grow(size)


def prepare_control(
    decoder: Decoder, tokenizer: Tokenizer | None, options: GenerateOptions
) -> Control:
    """The traced control of a generation.

    Raises:
        ValueError: a sampling parameter or stop is invalid, or stop strings come without a
            tokenizer.
    """
    sampling = Sampling.create(options.temperature, options.top_k, options.top_p, options.min_p)
    vocab_size = decoder.config.vocab_size
    unknown = [token for token in options.stop_ids if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(f"stop_ids outside the vocabulary of {vocab_size}: {unknown[:5]}")
    if options.stop and tokenizer is None:
        raise ValueError(
            "stop strings need a tokenizer, and this checkpoint has none; use stop_ids"
        )
    token_bytes = tokenizer.token_bytes(vocab_size) if options.stop and tokenizer else ()
    seed = options.seed
    return Control(
        sampling=sampling,
        stop_ids=stop_id_array((*decoder.config.eos_token_ids, *options.stop_ids)),
        stop_strings=StopStrings.build(options.stop, token_bytes),
        key=seed if isinstance(seed, jax.Array) else jax.random.key(seed),
        limit=jnp.int32(options.max_new_tokens),
    )


def _encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, continued: bool) -> list[int]:
    prompt = _as_list(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        if all(isinstance(item, Integral) for item in prompt):
            return [int(token) for token in cast(Sequence[int], prompt)]
        if all(isinstance(item, Mapping) for item in prompt):
            if continued:
                raise ValueError(
                    "a chat template begins a conversation; to continue a cache, give the next "
                    "turn as text or token ids, with the template's own separators"
                )
            messages = cast(Sequence[Message], prompt)
            return _needed(tokenizer).apply_chat_template(messages)
    if not isinstance(prompt, str):
        raise ValueError(
            f"a prompt is a text, a sequence of token ids or of chat messages, not {prompt!r}"
        )
    return (
        _needed(tokenizer).encode_plain(prompt) if continued else _needed(tokenizer).encode(prompt)
    )


def _as_list(prompts: Any) -> Any:
    """Arrays as lists; anything else as it is."""
    return prompts.tolist() if isinstance(prompts, np.ndarray | jax.Array) else prompts


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer; give prompts as token ids")
    return tokenizer
