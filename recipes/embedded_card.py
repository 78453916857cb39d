"""Puts the finished model's folder together and writes its card from what was measured.

`recipes/embedded.sh` runs this at its end. The card is README.md beside the weights: quality
through the exact cache and the compressed one, before and after training for it, a sample of text,
data, settings and commands.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from h1bjax.evaluate import evaluation_tokenizer, window_perplexity
from h1bjax.fingerprint import file_sha256
from h1bjax.model import Model, load
from h1bjax.retrieval import (
    CopyTask,
    KeyValueTask,
    copy_task,
    key_value_task,
    score_copies,
    score_key_values,
)
from h1bjax.text_files import read_documents
from h1bjax.windows import Windows, text_windows
from train.folder import JobFolder
from train.log import read_log

EXACT = "exact"

LARGEST = 12_000_000
"""Bytes that the folder may have, to fit into the package."""

BATCH = 16
RETRIEVAL_WINDOWS = 32

PROMPTS = (
    "It was a cold morning in November, and",
    '"You have not told me," said the old man,',
    "Of all the animals that live in the forest,",
)
SAMPLING: Mapping[str, Any] = {"max_new_tokens": 80, "temperature": 0.7, "top_p": 0.95, "seed": 0}


@dataclass(frozen=True)
class Tasks:
    """What the model is scored on, in windows of its whole context."""

    books: Windows
    copies: CopyTask
    key_values: KeyValueTask
    context: int

    @classmethod
    def create(cls, model: Model, documents: Sequence[str], tokens: int) -> "Tasks":
        """Windows of held-out text, at most `tokens` of it, and the retrieval tasks."""
        context, vocab = model.config.max_position_embeddings, model.config.vocab_size
        tokenizer = evaluation_tokenizer(model, context, BATCH)
        retrieval = {"context": context, "windows": RETRIEVAL_WINDOWS, "seed": 0}
        return cls(
            text_windows(tokenizer, vocab, documents, context=context, tokens=tokens),
            copy_task(tokenizer, vocab, documents, **retrieval),
            key_value_task(tokenizer, vocab, **retrieval),
            context,
        )

    def row(self, name: str, model: Model) -> str:
        """The scores of a model through its cache, as a row of the card's table."""
        shape = {"batch": BATCH, "length": self.context}
        books = window_perplexity(model.decoder, self.books, **shape)
        copies = score_copies(model.decoder, self.copies, **shape)
        answers = score_key_values(model.decoder, self.key_values, **shape)
        stored = model.spec.bytes_per_token(model.config.head_dim)
        return (
            f"| {name} | `{model.spec.name}`, {stored} | {books.bits_per_byte:.4f} | "
            f"{copies.bits_per_byte:.4f} | {answers.bits_per_byte:.4f} | "
            f"{100 * answers.accuracy:.1f}% |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Copies the model, evaluates it and writes its card.

    Raises:
        ValueError: the folder is larger than the package has room for, or the texts are not those
            that the model was trained on.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="the folder of recipes/embedded.sh; the result is its folder model",
    )
    parser.add_argument("--cache", required=True, help="that the model was trained to read")
    parser.add_argument("--source", required=True, help="where the books come from")
    parser.add_argument("--tokens", type=int, required=True, help="held-out tokens to score")
    options = parser.parse_args(arguments)

    work: Path = options.work
    taught = JobFolder(work / "taught")
    jobs = {"plain": JobFolder(work / "plain"), "plain, whole context": JobFolder(work / "long")}
    # Not every model was trained with shorter contexts first.
    jobs = {name: job for name, job in jobs.items() if job.record.is_file()} | {
        options.cache: taught
    }
    texts = [work / "plain.jsonl.xz", work / "retrieval.jsonl.xz"]
    held_out = work / "held_out.jsonl.xz"
    for job in jobs.values():
        if _settings(job)["text"] != [file_sha256(text) for text in texts]:
            raise ValueError(f"{job.path} was not trained on {', '.join(map(str, texts))}")
    tasks, rows = None, []
    for name, folder in [("before", work / "calibrated"), ("after", taught.model)]:
        for cache in (EXACT, options.cache):
            model = load(folder, cache=cache)
            tasks = tasks or Tasks.create(model, read_documents([held_out]), options.tokens)
            rows.append(tasks.row(name, model))
    assert tasks is not None

    result = work / "model"
    shutil.copytree(taught.model, result)
    card = "\n\n".join(
        [
            _head(model, options.cache),
            _quality(rows, tasks),
            _sample(model),
            _data([*texts, held_out], options.source),
            _training(jobs),
            _commands(work),
            LIMITS,
        ]
    )
    (result / "README.md").write_text(card + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in result.rglob("*") if file.is_file())
    if size > LARGEST:
        raise ValueError(f"{result} has {size} bytes, more than {LARGEST}")


def _settings(job: JobFolder) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(job.record.read_text(encoding="utf-8"))
    return settings


def _head(model: Model, cache: str) -> str:
    config = model.config
    parameters = sum(array.size for array in model.decoder.parameters().values())
    shape = (
        f"{config.num_layers} layers, {config.num_heads} query heads and {config.num_kv_heads} KV "
        f"heads of {config.head_dim} channels, hidden size {config.hidden_size}, MLPs of "
        f"{config.intermediate_size}, a context of {config.max_position_embeddings} tokens, a "
        f"byte-level BPE vocabulary of {config.vocab_size}, {config.dtype}"
    )
    return f"""\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The model that ships with h1bjax

A Llama of {parameters:,} parameters, trained from random weights: {shape}.
It continues texts in the manner of old English books, and was trained to read the compressed cache
`{cache}`, for which it is calibrated. transformers loads it too."""


def _quality(rows: Sequence[str], tasks: Tasks) -> str:
    scored = tasks.books.scored
    tokens, size = int(scored.sum()), int(tasks.books.target_bytes[scored].sum())
    table = [
        "| training for the cache | cache, bytes per token and KV head | held-out books | copy | "
        "key-value | key-value accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    return f"""\
## Quality

Bits per byte, read through the cache in windows of {tasks.context} tokens: {tokens:,} tokens
({size:,} bytes) of held-out books; passages of them that are repeated at the other end of a window
(copy); and the digits of codes that are asked for again (key-value), with the share of their
tokens that were the most probable ones; {RETRIEVAL_WINDOWS} windows each.

""" + "\n".join(table)


def _sample(model: Model) -> str:
    out = model.generate(list(PROMPTS), **SAMPLING)
    assert out.text is not None
    chosen = ", ".join(f"{name} {value}" for name, value in SAMPLING.items())
    quotes = [
        "> **" + prompt + "**" + text.replace("\n", "\n> ")
        for prompt, text in zip(PROMPTS, out.text, strict=True)
    ]
    return "\n\n".join([f"## What it writes\n\nThrough `{model.spec.name}`, {chosen}:", *quotes])


def _data(texts: Sequence[Path], source: str) -> str:
    lines = []
    origins = [source, "made from these by benchmarks/retrieval_text.py", "held out"]
    for text, origin in zip(texts, origins, strict=True):
        documents = read_documents([text])
        size = sum(len(document.encode()) for document in documents)
        lines.append(
            f"- {text.name}: {len(documents):,} documents, {size:,} bytes of UTF-8, sha256 "
            f"{file_sha256(text)}: {origin}"
        )
    return "\n".join(["## Data", "", *lines])


def _training(jobs: Mapping[str, JobFolder]) -> str:
    columns = [
        "trained for", "changes", "steps", "sequences a step", "tokens read", "peak learning rate",
        "distillation", "tokens a second", "last loss, nats per token",
    ]  # fmt: skip
    table = [columns, ["---"] * len(columns)]
    for name, job in jobs.items():
        settings, rows = _settings(job), read_log(job.log)
        speeds = [row.tokens_per_second for row in rows if row.tokens_per_second]
        read = settings["steps"] * settings["batch"] * settings["context"]
        table.append(
            [
                name,
                settings["scope"]["trained"],
                f"{settings['steps']}",
                f"{settings['batch']} of {settings['context']} tokens",
                f"{read:,}",
                f"{settings['learning_rate']:g}",
                f"{settings['distillation']:g}",
                f"{statistics.median(speeds):,.0f}" if speeds else "",
                f"{rows[-1].loss:.4f}",
            ]
        )
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    where = f"On {jax.devices()[0].device_kind}, {packages}."
    return "\n".join(["## Training", "", where, "", *lines])


def _commands(work: Path) -> str:
    written = (work / "commands.txt").read_text(encoding="utf-8").splitlines()
    # A run that was cut off and continued has commands twice.
    lines = dict.fromkeys(written)
    return "\n".join(["Commands, those of `recipes/embedded.sh`:", "", "```sh", *lines, "```"])


LIMITS = """\
## Limits and licence

It is made to try the library with nothing to download, not to be useful: it knows no facts, and
shares the views of the books' time. Apache-2.0, as the package."""


if __name__ == "__main__":
    main()
