"""How likely continuations are after their contexts, read through the model's own cache."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32
from tqdm import tqdm

from h1bjax.decoder import Decoder
from h1bjax.generate import bucket_size, prefill
from h1bjax.sharding import padded_rows, to_host
from h1bjax.window_scores import score_windows
from h1bjax.windows import Windows

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """Token ids to score.

    Attributes:
        context: what is read first.
        tokens: what should follow it.
    """

    context: Tokens
    tokens: Tokens

    def cut(self, max_length: int) -> "Continuation":
        """The same with so much of the context's end that at most `max_length` tokens are read.

        The last token is scored, not read.

        Raises:
            ValueError: something is empty, or the continuation alone is longer.
        """
        if not self.context or not self.tokens:
            raise ValueError("a context and its continuation need at least one token each")
        room = max_length + 1 - len(self.tokens)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(self.tokens)} tokens is longer than the model's "
                f"{max_length}"
            )
        return Continuation(self.context[-room:], self.tokens)


@dataclass(frozen=True)
class Score:
    """How well a continuation was predicted.

    Attributes:
        log_likelihood: natural logarithm of its probability after the context.
        greedy: whether each of its tokens was the most probable one.
    """

    log_likelihood: float
    greedy: bool


def score_continuations(
    decoder: Decoder, requests: Sequence[Continuation], *, batch: int, max_length: int
) -> list[Score]:
    """Scores continuations, each read through an empty cache as decoding would read it.

    Equal requests are read once, and so is a context of which several single tokens are asked, as
    in multiple choice. The others are sorted into powers of two by their lengths, so that few
    shapes compile.

    Args:
        decoder: its spec is the cache that is read.
        requests: contexts that are too long lose their beginning.
        batch: rows scored at a time. It changes speed and memory, not the result.
        max_length: the most tokens that are read.

    Returns:
        One score for each request, in their order.

    Raises:
        ValueError: a request is empty, or its continuation is too long.
        FloatingPointError: the model's logits are not finite.
    """
    cut = [request.cut(max_length) for request in requests]
    different = dict.fromkeys(cut)
    choices: dict[Tokens, list[int]] = defaultdict(list)
    for request in different:
        if len(request.tokens) == 1:
            choices[request.context].append(request.tokens[0])
    single = {context: tokens for context, tokens in choices.items() if len(tokens) > 1}
    rest = [
        request
        for request in different
        if not (len(request.tokens) == 1 and request.context in single)
    ]
    batch = padded_rows(decoder.mesh, batch)
    scores = _score_windows(decoder, rest, batch) | _score_choices(decoder, single, batch)
    return [scores[request] for request in cut]


def _score_windows(
    decoder: Decoder, requests: Sequence[Continuation], batch: int
) -> dict[Continuation, Score]:
    scores = {}
    groups: dict[int, list[Continuation]] = defaultdict(list)
    for request in requests:
        groups[bucket_size(len(request.context) + len(request.tokens) - 1)].append(request)
    # The longest first: what does not fit the memory fails at once.
    for length, group in sorted(groups.items(), reverse=True):
        rows = [np.array(request.context + request.tokens, np.int32) for request in group]
        windows = Windows.create([(row, np.zeros_like(row)) for row in rows], length + 1, None)
        found = score_windows(decoder, windows, batch=batch, length=length)
        for index, request in enumerate(group):
            end = windows.lengths[index]
            chosen = slice(end - len(request.tokens), end)
            scores[request] = Score(
                -float(found.nats[index, chosen].sum()), bool(found.correct[index, chosen].all())
            )
    return scores


def _score_choices(
    decoder: Decoder, choices: Mapping[Tokens, Sequence[int]], batch: int
) -> dict[Continuation, Score]:
    """Scores several next tokens of each context, which is read once."""
    scores = {}
    contexts = sorted(choices, key=len, reverse=True)
    with tqdm(
        total=len(contexts), desc="Scoring", unit="context", disable=None, leave=False
    ) as progress:
        for begin in range(0, len(contexts), batch):
            rows = contexts[begin : begin + batch]
            tokens = np.zeros(
                (batch, bucket_size(max(len(choices[row]) for row in rows))), np.int32
            )
            for index, row in enumerate(rows):
                tokens[index, : len(choices[row])] = choices[row]
            prompts = [list(row) for row in rows] + [[]] * (batch - len(rows))
            cache = decoder.init_cache(batch=batch, max_length=bucket_size(len(rows[0])))
            logits, _ = prefill(decoder, prompts, cache)
            nats, best = (to_host(array) for array in _choices(logits, jnp.asarray(tokens)))
            for index, row in enumerate(rows):
                for column, token in enumerate(choices[row]):
                    value = float(nats[index, column])
                    if not np.isfinite(value):
                        raise FloatingPointError(
                            "the logits after a context are not finite; the weights may overflow "
                            "in this dtype"
                        )
                    scores[Continuation(row, (token,))] = Score(-value, bool(best[index, column]))
            progress.update(len(rows))
    return scores


@jax.jit
def _choices(
    logits: Float[Array, "batch vocab"], tokens: Int32[Array, "batch choices"]
) -> tuple[Float32[Array, "batch choices"], Bool[Array, "batch choices"]]:
    """Negative log-likelihood of each token, and whether it is the likeliest of all."""
    logits = logits.astype(jnp.float32)
    wanted = jnp.take_along_axis(logits, tokens, axis=1)
    losses = jax.nn.logsumexp(logits, axis=1, keepdims=True) - wanted
    return losses, tokens == jnp.argmax(logits, axis=1, keepdims=True)
