"""Tools, calls and results as texts of ordinary turns, in Hermes' form: for templates that know none.

A model that was trained on calls was most likely trained on these marks, and any other reads what they mean.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .chat import Call, TemplateFacts, Tool, Turn
from .messages import arguments_of, function_of

GUIDE = """\
# Tools

These functions can be called. Each line is the JSON of one:
<tools>
{tools}
</tools>

To call one, answer with its name and its arguments as a JSON object between these marks:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>

What it returns will come between <tool_response> and </tool_response>."""


def as_text(turns: Sequence[Turn], tools: Sequence[Tool], facts: TemplateFacts) -> list[Turn]:
    """Turns of system, user and assistant alone, of which no two of the user's follow each other because of a result.

    Raises RefusedError for arguments or parameters that are no JSON.
    """
    turns = _merged(map(_plain, turns))
    if not tools:
        return turns
    guide = GUIDE.format(tools="\n".join(_json(function_of(tool)) for tool in tools))
    if turns and turns[0].role == "system":
        return [replace(turns[0], content=_paragraphs(turns[0].content, guide)), *turns[1:]]
    if facts.writes_system or not turns or turns[0].role != "user":
        return [Turn(role="system", content=guide), *turns]
    return [replace(turns[0], content=_paragraphs(guide, turns[0].content)), *turns[1:]]


def _plain(turn: Turn) -> Turn:
    if turn.role == "tool":
        return Turn(role="user", content=f"<tool_response>\n{turn.content}\n</tool_response>", call_id="a result")
    if not turn.calls:
        return turn
    calls = "\n".join(f"<tool_call>\n{_json(_object(call))}\n</tool_call>" for call in turn.calls)
    return replace(turn, content=f"{turn.content}\n{calls}" if turn.content else calls, calls=())


def _merged(turns: Iterable[Turn]) -> list[Turn]:
    """Results and what the user says around them are one turn: many templates let nobody speak twice."""
    merged: list[Turn] = []
    for turn in turns:
        before = merged[-1] if merged else None
        if before and before.role == turn.role == "user" and (before.call_id or turn.call_id):
            merged[-1] = replace(before, content=f"{before.content}\n{turn.content}")
        else:
            merged.append(turn)
    return [replace(turn, call_id="") for turn in merged]


def _object(call: Call) -> dict[str, object]:
    return {"name": call.name, "arguments": arguments_of(call)}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)
