"""What the quality study scores every cache on, and how it writes down what it found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from h1bjax import CacheSpec, Decoder
from h1bjax.calibration_file import is_calibratable
from h1bjax.config import LlamaConfig
from h1bjax.evaluate import evaluation_tokenizer, window_perplexity
from h1bjax.model import Model
from h1bjax.retrieval import (
    CopyTask,
    KeyValueTask,
    copy_task,
    key_value_task,
    score_copies,
    score_key_values,
)
from h1bjax.whole_file import replace_text
from h1bjax.window_scores import score_windows
from h1bjax.windows import Windows, text_windows


@dataclass(frozen=True)
class Tasks:
    """What every cache is scored on, cut into windows once.

    All have windows of one length and are read in batches of one size, so that one compiled
    function serves all of them.
    """

    books: Windows
    wikitext: Windows
    copies: CopyTask
    key_values: KeyValueTask
    context: int
    batch: int

    @classmethod
    def create(
        cls,
        model: Model,
        *,
        books: Sequence[str],
        wikitext: Sequence[str],
        books_tokens: int,
        wikitext_tokens: int,
        retrieval_windows: int,
        context: int,
        batch: int,
    ) -> Self:
        """The tasks of a model.

        Args:
            model: with a tokenizer.
            books: held-out documents, from which the passages to copy are taken too.
            wikitext: held-out documents of another kind.
            books_tokens: at most so many of the first are scored.
            wikitext_tokens: likewise of the second.
            retrieval_windows: windows of each of the two retrieval tasks.
            context: tokens of a window.
            batch: windows at a time.

        Raises:
            ValueError: the model cannot read such windows, or there is too little text.
        """
        trained = model.config.max_position_embeddings
        if context > trained:
            raise ValueError(
                f"--context {context} exceeds the {trained} tokens the model is made for"
            )
        tokenizer = evaluation_tokenizer(model, context, batch)
        vocab_size = model.config.vocab_size
        retrieval = {"context": context, "windows": retrieval_windows, "seed": 0}
        return cls(
            text_windows(tokenizer, vocab_size, books, context=context, tokens=books_tokens),
            text_windows(tokenizer, vocab_size, wikitext, context=context, tokens=wikitext_tokens),
            copy_task(tokenizer, vocab_size, books, **retrieval),
            key_value_task(tokenizer, vocab_size, **retrieval),
            context,
            batch,
        )

    def compile(self, decoder: Decoder) -> None:
        """Compiles what `score` needs for decoders of this spec, and runs it once."""
        score_windows(decoder, self.books.first(1), batch=self.batch, length=self.context)

    def score(self, decoder: Decoder) -> dict[str, Any]:
        """Scores a decoder through the cache of its spec."""
        shape = {"batch": self.batch, "length": self.context}
        scores: dict[str, Any] = {}
        for name, windows in [("books", self.books), ("wikitext", self.wikitext)]:
            result = window_perplexity(decoder, windows, **shape)
            scores[name] = {
                "bits_per_byte": result.bits_per_byte,
                "nats_per_token": result.nats_per_token,
                "tokens": result.tokens,
                "bytes": result.bytes,
                "late_bits_per_byte": None if result.late is None else result.late.bits_per_byte,
                "late_tokens": 0 if result.late is None else result.late.tokens,
                "late_bytes": 0 if result.late is None else result.late.bytes,
            }
        copies = score_copies(decoder, self.copies, **shape)
        scores["copy"] = {
            "bits_per_byte": copies.bits_per_byte,
            "first_bits_per_byte": copies.first.bits_per_byte,
            "tokens": copies.repeated.tokens,
            "bytes": copies.repeated.bytes,
        }
        answers = score_key_values(decoder, self.key_values, **shape)
        scores["key_value"] = {
            "bits_per_byte": answers.bits_per_byte,
            "accuracy": answers.accuracy,
            "tokens": answers.answers.tokens,
            "bytes": answers.answers.bytes,
        }
        return scores


def describe(config: LlamaConfig, spec: CacheSpec, context: int) -> dict[str, Any]:
    """What a preset is and costs, without its runs."""
    nbytes = spec.nbytes(config, batch=1, max_length=context)
    return {
        "name": spec.name,
        "keys": "evicted" if spec.evict else type(spec.keys).__name__,
        "calibratable": is_calibratable(spec),
        "bytes_per_token_head": spec.bytes_per_token(config.head_dim),
        "everything_per_token_head": nbytes / (config.num_layers * config.num_kv_heads * context),
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Replaces the file at once, so that a killed study leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
