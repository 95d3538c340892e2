"""Chat templates: messages -> the text that a model was trained to answer.

A template is a Jinja program that comes with a model (``chat_template.jinja``, or ``chat_template`` in its
``tokenizer_config.json``). It is rendered as transformers does (utils/chat_template_utils.py), with the filters,
globals and variables that templates count on, in Jinja's sandbox: it cannot reach the machine.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemotron_jax.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


class ChatTemplate:
    """A compiled template.

    Attributes:
      source: the Jinja program.
      origin: the file that it came from, for messages.
    """

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """``special_tokens``: variables such as bos_token. Raises DataError where the program does not compile."""
        self.source = source
        self.origin = origin
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            where = f"line {error.lineno}: {_one_line(error.message)}"
            raise DataError(f"{origin}: the chat template is not valid Jinja, {where}") from error

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate | None:
        """The template of a model's directory; None where it has none, as those of base models.

        Raises:
          DataError: a file that cannot be read, several templates with no default, or a template that is damaged.
        """
        config_file, template_file = directory / TOKENIZER_CONFIG_FILE, directory / TEMPLATE_FILE
        config = _read_config(config_file) if config_file.is_file() else {}
        if template_file.is_file():
            return cls(_read_text(template_file), str(template_file), _special_tokens(config))
        source = _default_template(config.get("chat_template"), config_file)
        return None if source is None else cls(source, str(config_file), _special_tokens(config))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        Args:
          messages: dicts with ``role`` and ``content``, and what else the template knows (``reasoning_content``,
            ``tool_calls``).
          add_generation_prompt: end with the opening of the assistant's turn.
          variables: further variables of the template: ``tools``, ``enable_thinking``.

        Raises:
          DataError: the template refuses the messages, or fails on them.
        """
        values = {"tools": None, "documents": None} | self._special_tokens | variables
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except _RefusedError as error:
            raise DataError(f"{self.origin}: the chat template refuses the conversation: {_one_line(error)}") from error
        except Exception as error:  # a template is a program: it may fail in any way
            what = f"{type(error).__name__}: {_one_line(error)}"
            raise DataError(f"{self.origin}: the chat template fails on the conversation: {what}") from error


class _RefusedError(jinja2.TemplateError):
    """What a template raises itself."""


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}`` marks what the assistant wrote; the text is the same without."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as text: {error}.") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: expected JSON: {error}.") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return values


def _default_template(value: Any, path: Path) -> str | None:
    """The program of ``chat_template``: a text, or a list of named ones."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        if "default" not in named:
            raise DataError(f"{path}: expected a chat template named 'default', got {sorted(map(str, named))}.")
        value = named["default"]
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"{path}: expected chat_template to be a text or a list of named ones, got {type(value).__name__}.")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, …: texts, or the objects with a ``content`` that transformers writes too."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in contents.items() if isinstance(value, str)}
