"""Chat templates, rendered as transformers renders them: jinja2, the same globals, in the sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RefusedError


class ChatTemplate:
    """Messages in, the text that the model was trained on out."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            source: the jinja text. It is compiled when it is first used: with a broken one, raw text still works.
            special_tokens: what the template may name, such as {"bos_token": "<s>"}.
        """
        self._source, self._special_tokens = source, dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages ({"role", "content"}) as text, ready for the answer. It holds whatever BOS the template writes.

        Raises RefusedError when the template is broken or refuses the messages.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program: it fails in any way that one can
            reason = str(error) or type(error).__name__
            raise RefusedError(f"the model's chat template refuses these messages: {reason}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        """Templates come with checkpoints, from strangers: they run in the sandbox."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self._source)


class _Generation(Extension):
    """`{% generation %}` marks what the model is trained on; for rendering it is nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
