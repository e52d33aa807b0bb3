"""A conversation's turns as the messages that templates are written for: OpenAI's, with arguments as objects."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ..errors import RefusedError
from .chat import HARMONY, MISTRAL, Call, TemplateFacts, Tool, Turn


def messages_of(turns: Iterable[Turn], facts: TemplateFacts) -> list[dict[str, Any]]:
    """Raises RefusedError for arguments that are no JSON object."""
    return [_message(turn, facts) for turn in turns]


def _message(turn: Turn, facts: TemplateFacts) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.name:
        message["name"] = turn.name
    if turn.reasoning:
        message["thinking" if facts.tool_format == HARMONY else "reasoning_content"] = turn.reasoning
    if turn.call_id:
        message["tool_call_id"] = _id(turn.call_id, facts)
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": _id(call.id, facts),
                "type": "function",
                "function": {"name": call.name, "arguments": arguments_of(call)},
            }
            for call in turn.calls
        ]
    return message


def arguments_of(call: Call) -> dict[str, Any]:
    """Raises RefusedError."""
    return json_of(call.arguments or "{}", dict, f"the arguments of the call of {call.name!r}")


def json_of(text: str, kind: type, where: str) -> Any:
    """A JSON text's value, which must be of `kind`. Raises RefusedError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{where} are no JSON: {text[:80]!r} ({error})") from error
    if not isinstance(value, kind):
        raise RefusedError(f"{where} must be a JSON {'object' if kind is dict else 'list'}, not {text[:80]!r}")
    return value


def _id(call_id: str, facts: TemplateFacts) -> str:
    """Mistral's templates take 9 letters and digits; equal ones stay equal."""
    if facts.tool_format != MISTRAL or re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.blake2b(call_id.encode(), digest_size=5).hexdigest()[:9]


def functions_of(tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """As OpenAI writes definitions. Raises RefusedError for parameters that are no JSON object."""
    return [{"type": "function", "function": function_of(tool)} for tool in tools]


def function_of(tool: Tool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    parameters = json_of(tool.parameters, dict, f"the parameters of the tool {tool.name!r}")
    return {"name": tool.name, **described, "parameters": parameters}


def apart(turns: Iterable[Turn], facts: TemplateFacts) -> Iterator[Turn]:
    """The same conversation for a template that would leave out, or refuse, several calls or a text beside calls: they
    become turns of their own, each call with its result behind it. Where there are channels a call has one text before
    it, which is a thought."""
    waiting = list(turns)
    while waiting:
        turn = waiting.pop(0)
        if turn.calls and turn.content and turn.reasoning and facts.tool_format == HARMONY:
            yield replace(turn, calls=(), reasoning="")
            turn = replace(turn, content="")
        elif turn.calls and turn.content and not facts.writes_text_beside_calls:
            yield replace(turn, calls=())
            turn = replace(turn, content="", reasoning="")
        if len(turn.calls) < 2 or facts.writes_several_calls:
            yield turn
            continue
        results = []
        while waiting and waiting[0].role == "tool":
            results.append(waiting.pop(0))
        for number, call in enumerate(turn.calls):
            yield replace(turn, calls=(call,), reasoning="" if number else turn.reasoning)
            own = [result for result in results if result.call_id == call.id]
            yield from own
            results = [result for result in results if result not in own]
        yield from results
