"""What a token contributes to the text: its bytes, and text streamed token by token.

The `decoder` entry of a tokenizer.json says how token strings become text. Two kinds cover the
Llama family: byte-level BPE, where each character of a token stands for one byte (the alphabet of
GPT-2), and SentencePiece-style BPE, where "▁" is a space and a token such as "<0x0A>" is one byte.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """The UTF-8 bytes of one token, and whether they may be only a part of a character."""

    data: bytes
    partial: bool


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE, inverted.

    Printable bytes stand for themselves; the others take the code points from 256 upwards
    (Radford et al. 2019, the encoder published with GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + offset): byte for offset, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class TokenDecoder:
    """The decoder of a tokenizer.json.

    Attributes:
        byte_level: Characters stand for bytes; the other fields are then unused.
        replacements: (pattern, content) pairs, applied in order to a token's string.
        byte_fallback: Tokens such as "<0x0A>" stand for one byte.
        strip_start: How many leading spaces the decoded text loses (the dummy prefix).
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_start: int = 0

    @classmethod
    def from_json(cls, spec: Mapping[str, Any] | None) -> TokenDecoder:
        """Reads the `decoder` entry of a tokenizer.json.

        Raises:
            ValueError: If the decoder does not map every token to its own bytes in a way known
                here; the message names it.
        """
        steps = _flatten(spec)
        kinds = [step["type"] for step in steps]
        if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return cls(byte_level=True)
        replacements: list[tuple[str, str]] = []
        strip_start = 0
        seen: list[str] = []
        for step in steps:
            match step:
                # Replacements come before bytes are decoded, or they would apply to those as well.
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if set(
                    seen
                ) <= {"Replace"}:
                    replacements.append((pattern, content))
                case {"type": "ByteFallback"} | {"type": "Fuse"} if step["type"] not in seen:
                    pass
                # Stripping before Fuse would strip every token, not the text.
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if seen[-1:] == [
                    "Fuse"
                ]:
                    strip_start = start
                case _:
                    seen = []
                    break
            seen.append(step["type"])
        if not seen or ("ByteFallback" in seen and "Fuse" in seen[: seen.index("ByteFallback")]):
            raise ValueError(
                f"tokenizer.json has a decoder of an unsupported kind: {spec}. Supported are "
                "ByteLevel and the SentencePiece-style sequence Replace, ByteFallback, Fuse, Strip."
            )
        return cls(False, tuple(replacements), "ByteFallback" in seen, strip_start)

    def piece(self, token: str) -> Piece:
        """The bytes that a token's string stands for, before any leading space is stripped."""
        if self.byte_level:
            if all(character in _BYTE_ALPHABET for character in token):
                return Piece(bytes(_BYTE_ALPHABET[character] for character in token), True)
            # Added tokens are plain text and may hold characters outside the alphabet.
            return Piece(token.encode(), True)
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return Piece(bytes([int(byte[1], 16)]), True)
        return Piece(token.encode(), False)


def _flatten(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [step for inner in spec["decoders"] for step in _flatten(inner)]
    return [spec]


@dataclass(frozen=True)
class TextStream:
    """Decodes tokens one at a time; a pure value, so keep the one that `push` returns.

    The texts that the pushes return, followed by that of `finish`, concatenate to what decoding
    all tokens at once gives. Characters whose bytes are not complete are held back. With byte
    fallback a whole run of byte tokens is held back until it ends, because one invalid byte makes
    the tokenizers library replace every byte of its run.

    Attributes:
        decoder: How token strings become text.
        piece: Maps a token id to its piece (without bytes for special tokens).
        pending: Bytes that are not yet text.
        to_strip: How many leading spaces are still to be dropped.
    """

    decoder: TokenDecoder
    piece: Callable[[int], Piece]
    pending: bytes = b""
    to_strip: int = 0

    def push(self, token: int) -> tuple[str, TextStream]:
        """Adds one token id.

        Returns:
            The text that has become certain ("" while a character is incomplete) and the stream
            that continues after this token.
        """
        data, partial = self.piece(token)
        if not data:
            return "", self
        if self.decoder.byte_level:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            text, pending = decoder.decode(self.pending + data), decoder.getstate()[0]
        elif partial:
            text, pending = "", self.pending + data
        else:
            text, pending = _decode_run(self.pending) + data.decode(), b""
        text, to_strip = _strip(text, self.to_strip)
        return text, replace(self, pending=pending, to_strip=to_strip)

    def finish(self) -> str:
        """The text of what was held back; U+FFFD stands for bytes that are not a character."""
        if self.decoder.byte_level:
            return self.pending.decode("utf-8", "replace")
        return _strip(_decode_run(self.pending), self.to_strip)[0]


def _decode_run(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(data)


def _strip(text: str, count: int) -> tuple[str, int]:
    """Drops up to `count` leading spaces; also returns how many later text may still lose."""
    spaces = min(count, len(text) - len(text.lstrip(" ")))
    rest = text[spaces:]
    return rest, 0 if rest else count - spaces
