"""Compiles chat templates: Jinja in its sandbox, with what published templates expect of it.

The names, filters and settings are those of `transformers.apply_chat_template`. What a `{% generation %}` block writes,
the part of an assistant that a model learns, is put between two marks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Code points that are no characters, and that no text exchanges.
OPEN, CLOSE = "\ufdd2", "\ufdd3"  # around what a generation block writes


def compile_template(source: str, origin: str) -> tuple[jinja2.Template, bool]:
    """Return the template, and whether it reads `tools`. Raises ValueError that names `origin` for a syntax error."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        names = {node.name for node in environment.parse(source).find_all(nodes.Name)}
        return environment.from_string(source), "tools" in names
    except (jinja2.TemplateError, RecursionError) as error:
        line = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"{origin}: not a template that Jinja can read{line}: {one_line(error)}") from None


class GenerationBlock(Extension):
    """`{% generation %}` ... `{% endgeneration %}`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as it is: Jinja's own filter would escape what HTML reserves."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def one_line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:297] + "..."
