"""What a task asks for when it has text generated, and generating it in batches."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
from tqdm import tqdm

from h1bjax.generate import bucket_size
from h1bjax.model import Model

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *_LENGTHS)


@dataclass(frozen=True)
class GenerationRequest:
    """How a text is continued.

    Attributes:
        until: texts that end it; they are not part of it.
        max_new_tokens: the most tokens that it gets.
        temperature: 0 takes the most probable token.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def create(cls, arguments: Mapping[str, Any], *, max_new_tokens: int) -> Self:
        """Reads the generation arguments of a task.

        Without `do_sample` the temperature alone decides whether tokens are drawn, and sampling
        without a temperature takes 1, as transformers do.

        Args:
            arguments: a task's `generation_kwargs`.
            max_new_tokens: where they do not say.

        Raises:
            ValueError: an argument is not supported.
        """
        if unknown := sorted(set(arguments) - set(_KNOWN)):
            raise ValueError(
                f"generation arguments that h1bjax does not have: {', '.join(unknown)}; it has "
                f"{', '.join(_KNOWN)}"
            )
        until = arguments.get("until") or ()
        given = {key: value for key, value in arguments.items() if value is not None}
        limit = next((given[name] for name in _LENGTHS if name in given), max_new_tokens)
        sampled = given.get("do_sample", given.get("temperature", 0) > 0)
        return cls(
            until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            max_new_tokens=int(limit),
            temperature=float(given.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(given.get("top_k", 0)) if sampled else 0,
            top_p=float(given.get("top_p", 1.0)) if sampled else 1.0,
            min_p=float(given.get("min_p", 0.0)) if sampled else 0.0,
        )


def generate_texts(
    model: Model,
    prompts: Sequence[tuple[list[int], GenerationRequest]],
    *,
    batch: int,
    seed: int,
) -> list[str]:
    """Continues prompts in batches of equal arguments and similar lengths.

    Args:
        model: with a tokenizer.
        prompts: token ids, with what is asked of each.
        batch: rows generated at a time.
        seed: of sampling.

    Returns:
        The texts, in the order of the prompts.
    """
    assert model.tokenizer is not None
    eos = model.tokenizer.eos_token_id
    groups: dict[GenerationRequest, list[int]] = defaultdict(list)
    for index, (_, request) in enumerate(prompts):
        groups[request].append(index)
    texts: dict[int, str] = {}
    key = jax.random.key(seed)
    with tqdm(
        total=len(prompts), desc="Generating", unit="text", disable=None, leave=False
    ) as progress:
        for request, indices in groups.items():
            indices.sort(key=lambda index: len(prompts[index][0]), reverse=True)
            for begin in range(0, len(indices), batch):
                rows = indices[begin : begin + batch]
                # The last batch repeats a prompt, so that no other shape compiles.
                filled = rows + rows[-1:] * (batch - len(rows))
                longest = len(prompts[rows[0]][0])
                output = model.generate(
                    [prompts[index][0] for index in filled],
                    max_new_tokens=request.max_new_tokens,
                    temperature=request.temperature,
                    top_k=request.top_k,
                    top_p=request.top_p,
                    min_p=request.min_p,
                    # Rows are drawn by their place in a batch, which must not repeat between these.
                    seed=jax.random.fold_in(key, len(texts)),
                    stop=request.until,
                    stop_ids=() if eos is None else (eos,),
                    max_length=bucket_size(longest + request.max_new_tokens),
                )
                assert output.text is not None
                texts |= zip(rows, output.text, strict=False)
                progress.update(len(rows))
    return [texts[index] for index in range(len(prompts))]
