"""Grammars of answers that call tools, in llguidance's form of Lark, for each way in which models write calls."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from ...engine_impl.errors import RefusedError
from ...engine_impl.text.chat import GEMMA, HARMONY, HERMES, LLAMA, MISTRAL, Tool
from ..dialects import gemma, harmony, hermes, llama, mistral
from ..dialects.syntax import AnswerSyntax
from .gemma_arguments import GENERIC, Arguments
from .grammar import Grammar, bounded_json, check_depth, literal

PLAIN = {"type", "properties", "required", "description", "title", "$defs", "definitions", "$schema"}
"""Keys of schemas that describe an object by its properties alone."""

ControlId = Callable[[str], int | None]
"""The control token that is written so; None: it is text."""

CONTENT = "content"
"""What the grammar of an answer that calls nothing is named within another one."""

TEXT = r"TEXT: /(.|\n)*/"
OTHER = r"OTHER: /([^{ \t\n\r](.|\n)*)?/"
"""A text that is no call where those are an object and nothing else."""

ANY_OBJECT = '{"type": "object", "additionalProperties": true}'
"""Parameters that hold arguments to nothing."""


def must_call(tools: Sequence[Tool], syntax: AnswerSyntax, most: int, control_id: ControlId) -> Grammar:
    """One of the tools is called, or up to `most` are; a thought may come before. Raises RefusedError for parameters
    that are no schema."""
    return _made("start: thought calls", _call_rules(tools, syntax, most, control_id), syntax, control_id)


def may_call(
    tools: Sequence[Tool], syntax: AnswerSyntax, most: int, content: Grammar, control_id: ControlId
) -> Grammar:
    """As `must_call`, or the answer is as `content` says."""
    rules = _call_rules(tools, syntax, most, control_id)
    start = f"thought calls | @{CONTENT}" if syntax.goes_on else f"thought (calls | {_content(syntax)})"
    return _made(f"start: {start}", rules, syntax, control_id, content)


def after_thought(syntax: AnswerSyntax, content: Grammar, control_id: ControlId) -> Grammar:
    """`content`, with a thought before it where the model thinks."""
    if syntax.goes_on or (syntax.think_tags is None and not syntax.channels):
        return content
    return _made(f"start: thought {_content(syntax)}", [], syntax, control_id, content)


def check_strict(tools: Sequence[Tool], strict: Collection[str], syntax: AnswerSyntax) -> None:
    """Raises RefusedError for a strict tool whose schema says what its arguments cannot be held to."""
    if syntax.tool_format != GEMMA:
        return
    for tool in tools:
        arguments = Arguments(literal(gemma.QUOTE))
        arguments.of(_checked(tool))
        if tool.name in strict and arguments.unheld:
            raise RefusedError(
                f"the tool {tool.name!r} is strict, and arguments in this model's form, which is no JSON, are not held "
                f"to {min(arguments.unheld)!r} of its parameters; leave that out, or strict"
            )


def strict_if_called(
    tools: Sequence[Tool], strict: Collection[str], syntax: AnswerSyntax, most: int, control_id: ControlId
) -> Grammar | None:
    """Any text; a call in it is one of the tools', with arguments as the schema says if it is strict. None: where calls
    are written so that a text may be the beginning of one until its end, this is left to the model."""
    loose = [tool if tool.name in strict else replace(tool, parameters=ANY_OBJECT) for tool in tools]
    if syntax.channels:
        if control_id(harmony.CHANNEL) is None:
            return None
        start = "start: thought said? (calls | final TEXT)" + " | TEXT" * syntax.goes_on
        return _made(start, [*_call_rules(loose, syntax, most, control_id)], syntax, control_id)
    openings = {HERMES: hermes.OPEN, MISTRAL: mistral.OPEN, LLAMA: llama.MARK, GEMMA: gemma.OPEN}
    opening = openings.get(syntax.tool_format or "")
    if opening is None:
        return None
    if control_id(opening) is not None:  # no text can hold it
        start = "start: thought (calls | OTHER)" if syntax.tool_format == LLAMA else "start: thought TEXT calls?"
        return _made(start, [OTHER, *_call_rules(loose, syntax, most, control_id)], syntax, control_id)
    if syntax.tool_format != HERMES or control_id(hermes.CLOSE) is not None:
        return None
    structures = []
    for tool in loose:
        schema = _schema(tool)
        begin = f'{hermes.OPEN}\n{{"name": {json.dumps(tool.name)}, "arguments": '
        structures.append((begin, schema, f"}}\n{hermes.CLOSE}"))
    return Grammar.of_structural_tag(structures, [hermes.OPEN])


def _content(syntax: AnswerSyntax) -> str:
    return f"final @{CONTENT}" if syntax.channels else f"@{CONTENT}"


def _made(
    start: str, rules: list[str], syntax: AnswerSyntax, control_id: ControlId, content: Grammar | None = None
) -> Grammar:
    lark = "\n".join(["%llguidance {}", start, TEXT, *_thought_rules(syntax, control_id), *rules])
    grammars: list[Any] = [{"lark_grammar": lark}]
    if content is not None:
        (own,) = json.loads(content.text)["grammars"]
        grammars.append({"name": CONTENT, **own})
    return Grammar(json.dumps({"grammars": grammars}, ensure_ascii=False))


def _call_rules(tools: Sequence[Tool], syntax: AnswerSyntax, most: int, control_id: ControlId) -> list[str]:
    tool_format = HARMONY if syntax.channels else syntax.tool_format
    assert tool_format is not None
    return RULES[tool_format](tools, most, control_id)


def _thought_rules(syntax: AnswerSyntax, control_id: ControlId) -> list[str]:
    if syntax.channels:
        return _channel_rules(syntax, control_id)
    if syntax.think_tags is None:
        return ['thought: ""']
    opening, closing = syntax.think_tags
    lazy = [f"rest[lazy]: TEXT {literal(closing)}"]
    if control_id(closing) is not None:
        lazy = [f"rest: TEXT {_mark(closing, control_id)}"]
    begin = "rest" if syntax.is_thinking else f"({_mark(opening, control_id)} rest)?"
    return [f"thought: {begin} BLANKS", *lazy, r"BLANKS: /[ \n]{0,2}/"]


def _channel_rules(syntax: AnswerSyntax, control_id: ControlId) -> list[str]:
    """A message to nobody ends with what begins the next one; so does one that goes on, before anything else."""
    channel, message, end, start, _ = (_mark(mark, control_id) for mark in harmony.MARKS)
    text = "rest: TEXT" if control_id(harmony.END) is not None else "rest[lazy]: TEXT"
    begun = f'rest {start} "assistant" ' * syntax.goes_on
    return [
        f'thought: {begun}({channel} "{harmony.ANALYSIS}" {message} rest {start} "assistant")?',
        f'said: {channel} "{harmony.COMMENTARY}" {message} rest {start} "assistant"',
        f'final: {channel} "{harmony.FINAL}" {message}',
        f"{text} {end}",
    ]


def _harmony(tools: Sequence[Tool], most: int, control_id: ControlId) -> list[str]:
    """A call ends the answer."""
    del most
    channel, message, _, _, constrain = (_mark(mark, control_id) for mark in harmony.MARKS)
    return [
        f'calls: {channel} "{harmony.COMMENTARY} to={harmony.FUNCTIONS}" function',
        "function: " + " | ".join(f"function_{number}" for number in range(len(tools))),
        *(
            f"function_{number}: {literal(tool.name)} "
            f'" " {constrain} "json" {message} %json {bounded_json(_schema(tool))}'
            for number, tool in enumerate(tools)
        ),
    ]


def _hermes(tools: Sequence[Tool], most: int, control_id: ControlId) -> list[str]:
    opening, closing = _mark(hermes.OPEN, control_id), _mark(hermes.CLOSE, control_id)
    return [
        _several("call", r'"\n"', most),
        rf'call: {opening} "\n" function "\n" {closing}',
        *_json_functions(tools, "arguments"),
    ]


def _llama(tools: Sequence[Tool], most: int, control_id: ControlId) -> list[str]:
    del most, control_id  # its templates let a turn call one
    return ["calls: function", *_json_functions(tools, "parameters")]


def _mistral(tools: Sequence[Tool], most: int, control_id: ControlId) -> list[str]:
    opening = _mark(mistral.OPEN, control_id)
    if control_id(mistral.ARGUMENTS) is None:
        several = _several("function", '", "', most).replace("calls:", "list:")
        return [f'calls: {opening} "[" list "]"', several, *_json_functions(tools, "arguments")]
    arguments = _mark(mistral.ARGUMENTS, control_id)
    return [
        _several("call", "", most),
        f"call: {opening} function",
        "function: " + " | ".join(f"function_{number}" for number in range(len(tools))),
        *(
            f"function_{number}: {literal(tool.name)} {arguments} %json {bounded_json(_schema(tool))}"
            for number, tool in enumerate(tools)
        ),
    ]


def _gemma(tools: Sequence[Tool], most: int, control_id: ControlId) -> list[str]:
    """Arguments are as their schemas say as far as that has a rule, see gemma_arguments.py."""
    opening, closing, quote = (_mark(mark, control_id) for mark in gemma.MARKS)
    text = f"text: {quote} TEXT {quote}"
    if control_id(gemma.QUOTE) is None:
        text = f"text: {quote} quoted\nquoted[lazy]: TEXT {quote}"
    arguments = Arguments(quote)
    functions = [f"{literal(f'call:{tool.name}')} {arguments.of(_checked(tool))}" for tool in tools]
    return [
        _several("call", "", most),
        f"call: {opening} function {closing}",
        "function: " + " | ".join(functions),
        *arguments.rules,
        text,
        GENERIC.strip(),
    ]


RULES: dict[str, Callable[[Sequence[Tool], int, ControlId], list[str]]] = {
    HERMES: _hermes,
    LLAMA: _llama,
    MISTRAL: _mistral,
    GEMMA: _gemma,
    HARMONY: _harmony,
}
"""The rule `calls` and those below it."""


def _several(rule: str, between: str, most: int) -> str:
    return f"calls: {rule}" + (f" ({between} {rule}){{0,{most - 1}}}" if most > 1 else "")


def _json_functions(tools: Sequence[Tool], key: str) -> list[str]:
    return [
        "function: " + " | ".join(f"function_{number}" for number in range(len(tools))),
        *(
            f"function_{number}: {literal(_head(tool.name, key))} %json {bounded_json(_schema(tool))} {literal('}')}"
            for number, tool in enumerate(tools)
        ),
    ]


def _head(name: str, key: str) -> str:
    return f'{{"name": {json.dumps(name)}, "{key}": '


def _mark(text: str, control_id: ControlId) -> str:
    token_id = control_id(text)
    if token_id is None:
        return literal(text)
    return text if re.fullmatch(r"<[^<>\s]+>", text) else f"<[{token_id}]>"


def _checked(tool: Tool) -> dict[str, Any]:
    """Its schema, for rules of our own. Raises RefusedError."""
    schema = _schema(tool)
    check_depth(schema)
    return schema


def _schema(tool: Tool) -> dict[str, Any]:
    """Of an object without properties that it does not name: without it a model may invent them for ever."""
    try:
        schema = json.loads(tool.parameters)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the parameters of the tool {tool.name!r} are no JSON ({error})") from error
    if not isinstance(schema, dict):
        raise RefusedError(f"the parameters of the tool {tool.name!r} must be a JSON object, a schema")
    named, required = schema.get("properties", {}), schema.get("required", [])
    is_closed = isinstance(named, dict) and isinstance(required, list) and set(schema) <= PLAIN
    if is_closed and all(name in named for name in required):
        schema["additionalProperties"] = False
    return {"type": "object", **schema}
