"""Text to token ids and back, from the tokenizer.json beside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers

from h1bjax.chat_template import read_chat_templates, render_chat
from h1bjax.json_file import read_json_object
from h1bjax.token_text import Piece, TextStream, TokenDecoder


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its special tokens and chat templates.

    Attributes:
        backend: The tokenizer of the `tokenizers` library; it is never changed after loading.
        decoder_spec: The `decoder` entry of tokenizer.json.
        special_tokens: Strings by name, such as {"bos_token": "<s>"}.
        chat_templates: Jinja sources by name; the usual one is "default".
        vocab_size: The largest token id plus one. A model may have a larger vocabulary.
        bos_token_id: The id of the token that begins a text, or None.
        eos_token_id: The id of the token that ends a text, or None. generation_config.json may
            name further ones; `LlamaConfig.eos_token_ids` holds them all.
        adds_bos: Whether `encode` puts `bos_token_id` in front.
    """

    backend: tokenizers.Tokenizer
    decoder_spec: Mapping[str, Any] | None
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    adds_bos: bool

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and templates.

        Ids agree with those of transformers' PreTrainedTokenizerFast: special tokens that the
        configuration names count as special, truncation and padding that tokenizer.json may ask
        for are off, and the post-processor of tokenizer.json alone says which special tokens are
        added to a text: transformers 5 reads `add_bos_token` and `add_eos_token` only where there
        is no tokenizer.json. Its LlamaTokenizer class also puts a pre-tokenizer of its own in the
        place of tokenizer.json's; that changes ids of leading spaces and after special tokens and
        is not followed here.

        Args:
            folder: The folder of a checkpoint.

        Raises:
            FileNotFoundError: If there is no such folder or it has no tokenizer.json.
            ValueError: If a file is not valid, or two files give a token different ids.
        """
        folder = Path(folder)
        path = _tokenizer_file(folder)
        spec = read_json_object(path)
        if "model" not in spec:
            raise ValueError(f"{path} is not a tokenizer: it has no entry 'model'")
        config = _read_config(folder)
        special_tokens = _special_tokens(config)
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        _register_special_tokens(backend, config, special_tokens)
        prefix = _added_prefix(backend)
        bos = _token_id(backend, special_tokens, "bos_token")
        if bos is None and len(prefix) == 1:
            bos = prefix[0]
        return cls(
            backend=backend,
            decoder_spec=spec.get("decoder"),
            special_tokens=special_tokens,
            chat_templates=read_chat_templates(folder, config),
            vocab_size=1 + max(backend.get_vocab(with_added_tokens=True).values()),
            bos_token_id=bos,
            eos_token_id=_token_id(backend, special_tokens, "eos_token"),
            adds_bos=bos is not None and prefix[:1] == [bos],
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that the tokenizer adds, such as BOS.

        Special tokens written out in the text become their ids.

        Raises:
            ValueError: If the text has lone surrogates, which UTF-8 cannot write.
        """
        return self.backend.encode(_checked(text), add_special_tokens=True).ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text alone; like `encode` without the added special tokens."""
        return self.backend.encode(_checked(text), add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens and unknown ids contribute nothing.

        As in transformers, a SentencePiece-style tokenizer drops one leading space, and bytes
        that are not valid UTF-8 become U+FFFD.

        Raises:
            ValueError: If an id is negative.
        """
        ids = [int(token) for token in tokens]
        if negative := [token for token in ids if token < 0]:
            raise ValueError(f"token ids must not be negative: {negative[:5]}")
        return self.backend.decode(ids, skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A stream that decodes the tokens of one text as they come.

        Raises:
            ValueError: If tokenizer.json has a decoder of an unsupported kind.
        """
        decoder = self._decoder
        return TextStream(decoder, self._piece, to_strip=decoder.strip_start)

    def token_bytes(self, vocab_size: int | None = None) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each token id contributes to a text.

        Concatenated over `encode_plain(text)` they are the UTF-8 of the text as the tokenizer
        normalises it, with the space that SentencePiece-style tokenizers put in front.

        Args:
            vocab_size: How many ids to cover, `self.vocab_size` by default. A model's vocabulary
                may be larger or smaller than its tokenizer's.

        Returns:
            One entry per id, b"" for special tokens and for ids without a token.

        Raises:
            ValueError: If tokenizer.json has a decoder of an unsupported kind.
        """
        known = self._token_bytes
        size = self.vocab_size if vocab_size is None else vocab_size
        return known[:size] + (b"",) * (size - len(known))

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the tokenizer's own chat template makes of messages.

        Args:
            messages: {"role": ..., "content": ...} mappings, oldest first.
            add_generation_prompt: Whether the prompt ends where the assistant's answer begins.

        Raises:
            ValueError: If the tokenizer has no chat template, the messages are malformed, or the
                template refuses them.
        """
        if "default" not in self.chat_templates:
            named = (
                f" (it has only {', '.join(self.chat_templates)})" if self.chat_templates else ""
            )
            raise ValueError(
                f"the tokenizer has no default chat template{named}: give a plain prompt, or add a "
                "chat_template.jinja to the folder of the tokenizer"
            )
        return render_chat(
            self.chat_templates["default"], messages, self.special_tokens, add_generation_prompt
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of `chat_text`; special tokens are those that the template itself writes."""
        return self.encode_plain(self.chat_text(messages, add_generation_prompt))

    @cached_property
    def _decoder(self) -> TokenDecoder:
        return TokenDecoder.from_json(self.decoder_spec)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def _token_bytes(self) -> tuple[bytes, ...]:
        return tuple(self._piece(token).data for token in range(self.vocab_size))

    def _piece(self, token: int) -> Piece:
        token = int(token)
        if token < 0:
            raise ValueError(f"token ids must not be negative: {token}")
        text = None if token in self._special_ids else self.backend.id_to_token(token)
        return Piece(b"", False) if text is None else self._decoder.piece(text)


def _tokenizer_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    path = folder / "tokenizer.json"
    if path.is_file():
        return path
    sources = ("tokenizer.model", "vocab.json", "tekken.json")
    found = [name for name in sources if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    raise FileNotFoundError(
        f"{folder} has no tokenizer.json, only {', '.join(found)}, which must be converted once: "
        f"transformers.AutoTokenizer.from_pretrained({str(folder)!r})"
        f".save_pretrained({str(folder)!r})"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json where transformers does so."""
    path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json_object(path) if path.is_file() else {}
    if "added_tokens_decoder" not in config and map_path.is_file():
        config |= read_json_object(map_path)
    return config


def _content(token: object) -> str | None:
    """The string of a token written as "<s>" or as {"content": "<s>", ...}; None for others."""
    if isinstance(token, Mapping):
        token = token.get("content")
    # Some early checkpoints write "" where they mean that there is no such token.
    return token if isinstance(token, str) and token else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    if isinstance(extra := _extra_special_tokens(config), Mapping):
        named |= extra
    return {name: text for name, token in named.items() if (text := _content(token)) is not None}


def _extra_special_tokens(config: Mapping[str, Any]) -> Mapping[str, Any] | Sequence[Any]:
    """Special tokens beyond the usual ones, with names (a mapping) or without."""
    return config.get("extra_special_tokens") or config.get("additional_special_tokens") or []


def _register_special_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Makes the tokens that the configuration calls special so in the tokenizer.

    Raises:
        ValueError: If a token would get another id than the configuration gives it.
    """
    added = backend.get_added_tokens_decoder()
    known = {token.content: token for token in added.values()}
    declared = {
        text: (int(index), token)
        for index, token in config.get("added_tokens_decoder", {}).items()
        if (text := _content(token)) is not None and text not in known
    }
    for text, (_, token) in sorted(declared.items(), key=lambda item: item[1][0]):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flag = {name: token[name] for name in flags if name in token}
        backend.add_tokens([tokenizers.AddedToken(text, **flag)])
    wrong = {
        text: (index, backend.token_to_id(text))
        for text, (index, _) in declared.items()
        if backend.token_to_id(text) != index
    }
    if wrong:
        raise ValueError(
            "added_tokens_decoder in tokenizer_config.json names tokens that tokenizer.json does "
            "not have under these ids: "
            + ", ".join(f"{text!r} is {there}, not {said}" for text, (said, there) in wrong.items())
        )
    extra = _extra_special_tokens(config)
    unnamed = [] if isinstance(extra, Mapping) else extra
    added = backend.get_added_tokens_decoder()
    known = {token.content: token for token in added.values()}
    for text in [*named.values(), *filter(None, map(_content, unnamed))]:
        token = known.get(text)
        if token is None:
            backend.add_special_tokens([text])
        elif not token.special and text in named.values():
            token.special = True
            backend.add_special_tokens([token])


def _added_prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The ids that the post-processor puts in front of a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], marked)]


def _token_id(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], name: str
) -> int | None:
    return backend.token_to_id(special_tokens[name]) if name in special_tokens else None


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate at character {error.start}, which UTF-8 cannot write"
        ) from error
    return text
