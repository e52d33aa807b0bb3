"""Chat templates, rendered as transformers renders them: jinja2, the same globals, in the sandbox.

Templates come with checkpoints, from strangers, and a template is a program: it is run in a process of its own, with
bounds on its time, its memory and what it writes.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RefusedError
from ..runtime.workers import WorkerError, Workers

WORKERS = Workers(2, seconds=3.0, memory_mib=256)
"""Where all templates of this process are rendered."""
MORE_CHARACTERS = 1 << 20
"""What a template may write beyond FACTOR times what it was given (characters)."""
FACTOR = 4
REASON = 500
"""The longest reason of a refusal that is passed on (characters)."""
PROBE = ({"role": "user", "content": "Why is the sky blue?"},)

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """Messages in, the text that the model was trained on out."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            source: the jinja text. With a broken one, raw text still works.
            special_tokens: what the template may name, such as {"bos_token": "<s>"}.
        """
        self.source, self._special_tokens = source, tuple(special_tokens.items())

    def render(self, messages: Messages) -> str:
        """Messages ({"role", "content"}) as text, ready for the answer. It holds whatever BOS the template writes.

        Raises RefusedError when the template is broken, refuses the messages, or takes more than it may.
        """
        try:
            return WORKERS.call(render, self.source, self._special_tokens, [dict(message) for message in messages])
        except WorkerError as error:
            raise RefusedError(f"the model's chat template {error} with these messages; send raw text") from error

    def check(self) -> None:
        """Raises RefusedError for one that comes to no end with a short conversation. One that is broken, or refuses
        it, is told when a chat comes."""
        try:
            WORKERS.call(render, self.source, self._special_tokens, PROBE)
        except WorkerError as error:
            raise RefusedError(f"the model's chat template {error} with one short message; mend it") from error
        except RefusedError:
            pass


def render(source: str, special_tokens: tuple[tuple[str, str], ...], messages: Messages) -> str:
    """In a worker. Raises RefusedError, and WorkerError for a text that grows too long."""
    limit = MORE_CHARACTERS + FACTOR * sum(len(str(part)) for message in messages for part in message.values())
    pieces, length = [], 0
    try:
        for piece in template(source).generate(
            **dict(special_tokens),
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
        ):
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


@lru_cache(maxsize=4)
def template(source: str) -> jinja2.Template:
    """Compiled, in the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


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
