"""Retrieval over a grid of context lengths, for one cache after another."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from h1bjax.evaluate import evaluation_tokenizer
from h1bjax.model import Model
from h1bjax.passkey import FILLER, PasskeyScore, PasskeyTask, passkey_task, score_passkeys
from h1bjax.retrieval import KeyValueScore, KeyValueTask, key_value_task, score_key_values


@dataclass(frozen=True)
class RetrievalGrid:
    """The tasks of a study, the same for every cache.

    Attributes:
        contexts: tokens of the windows.
        depths: where the passkeys stand: 0 at the text's beginning, 1 at its end.
        passkeys: by context.
        key_values: by context.
    """

    contexts: tuple[int, ...]
    depths: tuple[float, ...]
    passkeys: tuple[PasskeyTask, ...]
    key_values: tuple[KeyValueTask, ...]


@dataclass(frozen=True)
class RetrievalScores:
    """What one cache achieved.

    Attributes:
        preset: the cache's name.
        bytes_per_token: of one more token in one KV head.
        passkeys: by context.
        key_values: by context.
    """

    preset: str
    bytes_per_token: int
    passkeys: tuple[PasskeyScore, ...]
    key_values: tuple[KeyValueScore, ...]


def retrieval_grid(
    model: Model,
    contexts: Sequence[int],
    *,
    depths: int = 5,
    windows: int = 8,
    filler: Sequence[str] = (FILLER,),
    seed: int = 0,
) -> RetrievalGrid:
    """Makes the tasks.

    Args:
        model: with a tokenizer; any cache.
        contexts: tokens of the windows.
        depths: how many, evenly from the beginning to the end.
        windows: passkeys at each context and depth, and windows of key-value lines at each context.
        filler: the text around the passkeys.
        seed: of all that is random.

    Raises:
        ValueError: an argument is invalid, or a context is too short or longer than the model is
            made for.
    """
    if not contexts or depths < 2:
        raise ValueError(f"contexts={list(contexts)}, depths={depths}: give a context, 2 depths")
    ordered = tuple(sorted(set(contexts)))
    tokenizer = evaluation_tokenizer(model, ordered[-1], 1)
    vocab_size, made_for = model.config.vocab_size, model.config.max_position_embeddings
    # A BOS stands in front of a window and is read too.
    if ordered[-1] > made_for:
        raise ValueError(f"context={ordered[-1]} exceeds the {made_for} tokens of the model")
    places = tuple(index / (depths - 1) for index in range(depths))
    return RetrievalGrid(
        ordered,
        places,
        tuple(
            passkey_task(
                tokenizer,
                vocab_size,
                context=context,
                depths=places,
                windows=windows,
                seed=seed,
                filler=filler,
            )
            for context in ordered
        ),
        tuple(
            key_value_task(tokenizer, vocab_size, context=context, windows=windows, seed=seed)
            for context in ordered
        ),
    )


def score_caches(
    grid: RetrievalGrid, models: Iterable[Model], *, batch: int
) -> Iterator[RetrievalScores]:
    """Scores one model after another, which are the same but for their caches.

    Args:
        grid: the tasks.
        models: only one of them is needed at a time.
        batch: windows scored at a time. It changes speed and memory, not the result.

    Raises:
        FloatingPointError: a model's logits are not finite.
    """
    for model in models:
        sizes = [{"batch": batch, "length": context} for context in grid.contexts]
        yield RetrievalScores(
            model.spec.name,
            model.spec.bytes_per_token(model.config.head_dim),
            tuple(
                score_passkeys(model.decoder, task, **size)
                for task, size in zip(grid.passkeys, sizes, strict=True)
            ),
            tuple(
                score_key_values(model.decoder, task, **size)
                for task, size in zip(grid.key_values, sizes, strict=True)
            ),
        )
