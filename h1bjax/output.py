"""What a generation returns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from h1bjax.cache import KVCache
from h1bjax.stopping import could_begin_stop, cut_at_stop
from h1bjax.token_text import TextStream
from h1bjax.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerateOutput:
    """The new tokens of every prompt.

    Attributes:
        text: what each row continues with, cut before a stop string; None without a tokenizer.
        tokens: the new token ids, stop ids left out.
        logprobs: natural log-probability of each new token under the model's own distribution,
            before temperature and filters; None unless asked for.
        finish_reasons: "stop" where a stop id or stop string ended the row, else "length".
        cache: holds the prompts and everything generated, stop ids included, so that another turn
            can follow it.
        decode_seconds: wall time of the decode steps; prefill and compilation are not in it.
    """

    text: list[str] | None
    tokens: list[list[int]]
    logprobs: list[list[float]] | None
    finish_reasons: list[FinishReason]
    cache: KVCache
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding."""
        return sum(map(len, self.tokens)) / self.decode_seconds


@dataclass(frozen=True)
class StreamStep:
    """One step of a streamed generation, one entry per row.

    Attributes:
        text: what became certain with this step, "" if nothing did; the steps' texts concatenate
            to the text of `GenerateOutput`. None without a tokenizer.
        tokens: the new token id, None for a row that has none.
        finished: whether the row has stopped.
        cache: as `GenerateOutput.cache`; the next step consumes it, so use that of the last.
    """

    text: list[str] | None
    tokens: list[int | None]
    finished: list[bool]
    cache: KVCache


@dataclass(frozen=True)
class RowText:
    """The text of one row as its tokens come. A pure value: `push` returns the next one.

    Attributes:
        stream: decodes tokens after the prompt.
        stop_strings: texts that end the row; neither they nor what follows is part of the text.
        text: all that was decoded.
        emitted: characters already given out.
    """

    stream: TextStream
    stop_strings: tuple[str, ...]
    text: str = ""
    emitted: int = 0

    @classmethod
    def after(
        cls, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: tuple[str, ...]
    ) -> Self:
        """The empty continuation of a prompt.

        Only a text's first token loses the space that the tokenizer puts before it, so none is
        lost after a prompt that ends in text.
        """
        stream = tokenizer.stream()
        after_text = bool(stream.piece(prompt[-1]).data)
        return cls(replace(stream, to_strip=0) if after_text else stream, stop_strings)

    def push(self, token: int) -> tuple[str, Self]:
        """Adds a token; returns the text that is certain now."""
        delta, stream = self.stream.push(token)
        text = self.text + delta
        certain = cut_at_stop(text, self.stop_strings)
        if certain == text:
            certain = text[: len(text) - could_begin_stop(text, self.stop_strings)]
        emitted = max(self.emitted, len(certain))
        return text[self.emitted : emitted], replace(
            self, stream=stream, text=text, emitted=emitted
        )

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        return cut_at_stop(self.text + self.stream.finish(), self.stop_strings)[self.emitted :]

    def decode(self, tokens: Sequence[int]) -> str:
        """The whole text of a finished row."""
        pieces, row = [], self
        for token in tokens:
            delta, row = row.push(token)
            pieces.append(delta)
        return "".join([*pieces, row.finish()])
