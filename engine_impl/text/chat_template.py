"""Chat templates, rendered as transformers renders them: jinja2, the same globals, in the sandbox.

Templates come with checkpoints, from strangers, and a template is a program: it is run in a process of its own, with
bounds on its time, its memory and what it writes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..errors import RefusedError
from ..runtime.workers import WorkerError, Workers
from .chat import Chat, TemplateFacts
from .messages import apart, functions_of, json_of, messages_of
from .template_facts import examine
from .templates import written
from .tools_as_text import as_text

WORKERS = Workers(2, seconds=3.0, memory_mib=256)
"""Where all templates of this process are rendered."""
MORE_CHARACTERS = 1 << 20
"""What a template may write beyond FACTOR times what it was given (characters)."""
FACTOR = 4
PROBE = Chat.of([{"role": "user", "content": "Why is the sky blue?"}])

OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables that a conversation's own parts are."""
GOES_ON = "\ue000the answer goes on here\ue001"
"""Put behind a last message that is to be continued, to see where the template ends it; private characters."""


class ChatTemplate:
    """A conversation in, the text that the model was trained on out."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            source: the jinja text. With a broken one, raw text still works.
            special_tokens: what the template may name, such as {"bos_token": "<s>"}.
        """
        self.source, self._special_tokens = source, tuple(special_tokens.items())

    @cached_property
    def facts(self) -> TemplateFacts:
        """Those of none for a template that takes more than it may."""
        try:
            return WORKERS.call(examine, self.source, self._special_tokens)
        except WorkerError:
            return TemplateFacts()

    def render(self, chat: Chat) -> str:
        """A conversation as text, ready for the answer. It holds whatever BOS the template writes.

        Raises RefusedError when the template is broken, refuses the messages, does not read what they come with, or
        takes more than it may.
        """
        try:
            return WORKERS.call(render, self.source, self._special_tokens, chat, self.facts)
        except WorkerError as error:
            raise RefusedError(f"the model's chat template {error} with these messages; send raw text") from error

    def check(self) -> None:
        """Raises RefusedError for one that comes to no end with a short conversation. One that is broken, or refuses
        it, is told when a chat comes."""
        try:
            WORKERS.call(render, self.source, self._special_tokens, PROBE, TemplateFacts())
        except WorkerError as error:
            raise RefusedError(f"the model's chat template {error} with one short message; mend it") from error
        except RefusedError:
            pass


def render(source: str, special_tokens: tuple[tuple[str, str], ...], chat: Chat, facts: TemplateFacts) -> str:
    """In a worker. Raises RefusedError, and WorkerError for a text that grows too long."""
    turns, tools = list(chat.turns), functions_of(chat.tools)
    if chat.continue_final_message:
        turns[-1] = replace(turns[-1], content=turns[-1].content + GOES_ON)
    if chat.as_text:
        turns, tools = as_text(turns, chat.tools, facts), []
    variables = {
        **dict(special_tokens),
        **_more_variables(chat, facts),
        "messages": messages_of(apart(turns, facts), facts),
        "tools": tools or None,
        "documents": _documents(chat, facts),
        "add_generation_prompt": chat.add_generation_prompt,
    }
    text = written(source, variables, MORE_CHARACTERS + FACTOR * chat.size)
    return _cut(text) if chat.continue_final_message else text


def _more_variables(chat: Chat, facts: TemplateFacts) -> dict[str, Any]:
    """Raises RefusedError for one that the template does not read: it would change nothing."""
    given = json_of(chat.template_kwargs or "{}", dict, "chat_template_kwargs")
    if chat.enable_thinking is not None:
        given["enable_thinking"] = chat.enable_thinking
    if chat.reasoning_effort:
        given |= _effort(chat.reasoning_effort, facts)
    for name in given:
        if name in OURS:
            raise RefusedError(f"chat_template_kwargs: {name!r} has a field of its own in the request; send it there")
        if name not in facts.variables and not (name == "enable_thinking" and given[name] is False):
            raise RefusedError(f"chat_template_kwargs: the model's chat template does not read {name!r}; leave it out")
    return given


def _effort(effort: str, facts: TemplateFacts) -> dict[str, Any]:
    """As the template is told of it. Raises RefusedError for one that takes none."""
    if "reasoning_effort" in facts.variables:
        return {"reasoning_effort": effort}
    if effort == "none":
        return {"enable_thinking": False}
    raise RefusedError(
        f"reasoning_effort={effort!r}: the model's chat template does not read it; leave it out, or send 'none'"
    )


def _documents(chat: Chat, facts: TemplateFacts) -> list[Any] | None:
    if not chat.documents:
        return None
    if "documents" not in facts.variables:
        raise RefusedError("documents: the model's chat template does not read them; put them into a message")
    return json_of(chat.documents, list, "documents")


def _cut(text: str) -> str:
    """Up to where the last message ends."""
    at = text.rfind(GOES_ON)
    if at < 0:
        raise RefusedError("continue_final_message: the model's chat template does not write the last message as it is")
    return text[:at]
