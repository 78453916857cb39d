"""Chat templates: Jinja programs, shipped with a tokenizer, that write messages out as a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a tokenizer by name; the unnamed one is "default".

    Template files (chat_template.jinja, additional_chat_templates/*.jinja) take the place of
    `chat_template` in tokenizer_config.json, as in transformers.

    Args:
        folder: The tokenizer's folder.
        config: The parsed tokenizer_config.json.

    Raises:
        ValueError: If `chat_template` is neither a string nor a list of {"name", "template"}.
    """
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (default := folder / "chat_template.jinja").is_file():
        files["default"] = default
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    match config.get("chat_template"):
        case None:
            return {}
        case str(template):
            return {"default": template}
        case [*entries] if all(_is_named_template(entry) for entry in entries):
            return {entry["name"]: entry["template"] for entry in entries}
        case other:
            raise ValueError(
                f"chat_template in {folder / 'tokenizer_config.json'} must be a string or a list "
                f'of {{"name": ..., "template": ...}}, not {other!r:.200}'
            )


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, Mapping) and all(
        isinstance(entry.get(key), str) for key in ("name", "template")
    )


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that messages are a non-empty sequence of {"role": str, "content": str}.

    Raises:
        ValueError: Naming every malformed message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            'messages must be a list of {"role": ..., "content": ...}, '
            f"not a {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages is empty; a chat needs at least one message")
    problems = [
        f"message {index}: {problem}"
        for index, message in enumerate(messages)
        for problem in _message_problems(message)
    ]
    if problems:
        raise ValueError(
            'every message must be {"role": str, "content": str}; ' + "; ".join(problems)
        )


def _message_problems(message: object) -> list[str]:
    if not isinstance(message, Mapping):
        return [f"is a {type(message).__name__}, not a mapping"]
    return [
        f"{key!r} is missing" if key not in message else f"{key!r} is {message[key]!r:.80}"
        for key in ("role", "content")
        if not isinstance(message.get(key), str)
    ]


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """Writes messages out with a chat template, giving it what transformers gives it.

    The template runs in a sandbox, because it is code that came with a checkpoint.

    Args:
        template: Jinja source.
        messages: {"role", "content"} mappings; further keys reach the template too.
        special_tokens: Strings such as {"bos_token": "<s>"}, which are variables in the template.
        add_generation_prompt: Whether the text ends where the assistant's answer begins.

    Raises:
        ValueError: If the messages are malformed, or if the template is invalid or refuses them.
    """
    check_messages(messages)
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=[_without_none(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        )
    except TemplateError as error:
        raise ValueError(f"the chat template failed: {error}") from error


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    # Templates test for missing keys and would write "None".
    return {key: value for key, value in message.items() if value is not None}


class _Generation(Extension):
    """Accepts {% generation %}, which marks the assistant's words for training; it prints them."""

    tags = {"generation"}  # noqa: RUF012 (the attribute is Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not contain.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
