"""Jinja as chat templates need it: transformers' globals and filters, in the sandbox. Used in a worker."""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RefusedError
from ..runtime.workers import WorkerError

REASON = 500
"""The longest reason of a refusal that is passed on (characters)."""


def written(source: str, variables: Mapping[str, Any], limit: int) -> str:
    """What a template writes. Raises RefusedError, and WorkerError for a text of more than `limit` characters."""
    pieces, length = [], 0
    try:
        for piece in template(source).generate(**variables):
            length += len(piece)
            if length > limit:
                raise WorkerError(f"writes more than {limit} characters")
            pieces.append(piece)
    except (MemoryError, WorkerError):
        raise
    except Exception as error:  # a template is a program: it fails in any way that one can
        reason = str(error) or type(error).__name__
        raise RefusedError(f"the model's chat template refuses these messages: {reason[:REASON]}") from error
    return "".join(pieces)


def variables_of(source: str) -> frozenset[str]:
    """What a template reads; nothing of one that is broken."""
    try:
        return frozenset(meta.find_undeclared_variables(environment().parse(source)))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()


@lru_cache(maxsize=4)
def template(source: str) -> jinja2.Template:
    """Compiled, in the sandbox."""
    return environment().from_string(source)


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


class _Generation(Extension):
    """`{% generation %}` marks what the model is trained on; for rendering it is nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Without jinja2's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
