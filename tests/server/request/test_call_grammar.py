"""Grammars of answers that call tools, held to llguidance itself and read back."""

import json
import random
import re
from functools import cache
from typing import Any

import jsonschema
import llguidance
import llguidance.numpy as masks
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.text.chat import Tool
from slipstream.engine_impl.text.grammar import Bytes
from slipstream.server.dialects import gemma
from slipstream.server.dialects.syntax import FORMATS, AnswerReader, AnswerSyntax
from slipstream.server.request.call_grammar import after_thought, may_call, must_call, strict_if_called
from slipstream.server.request.chat import MAX_CALLS
from slipstream.server.request.grammar import Grammar

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"enum": [1, 2.5, "all"]}},
    "required": ["city"],
}
WEATHER = Tool(name="get_weather", parameters=json.dumps(SCHEMA))
NOW = Tool(name="now")
TOOLS = [WEATHER, NOW]
NAMES = frozenset({"get_weather", "now"})
THINK = ("<think>", "</think>")
ROME = '{"city": "Rome"}'
WHOLE = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>',
    "llama": f'{{"name": "get_weather", "parameters": {ROME}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}]',
    "gemma": "<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call>",
}


CONTROL = ["<think>", "</think>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"]
CONTROL += ["<|python_tag|>", "<tool_call>", "</tool_call>", *gemma.MARKS]
MARK = re.compile("|".join(map(re.escape, CONTROL)))


@cache
def tokenizer():
    """A token is a byte; the control tokens are behind them."""
    made: Any = Bytes(CONTROL)
    return llguidance.LLTokenizer(made, slices=[])


def control_id(text):
    return 257 + CONTROL.index(text) if text in CONTROL else None


def no_control(text):
    return None


def syntax(tool_format, **more):
    return AnswerSyntax(tool_format=tool_format, tools=NAMES, **more)


def matcher(grammar):
    made = llguidance.LLMatcher(tokenizer(), grammar.text)
    assert not made.is_error(), made.get_error()
    return made


def tokens_of(text, control_id):
    """Control tokens as they are written, and bytes between them."""
    tokens, at = [], 0
    for mark in MARK.finditer(text):
        token_id = control_id(mark[0])
        tokens += [*text[at : mark.start()].encode(), *(mark[0].encode() if token_id is None else [token_id])]
        at = mark.end()
    return [*tokens, *text[at:].encode()]


def takes(grammar, text, control_id=lambda text: None):
    """Whether the answer may be this text and end there."""
    following, tokens = matcher(grammar), tokens_of(text, control_id)
    return following.try_consume_tokens(tokens) == len(tokens) and following.is_accepting()


def walk(grammar, seed):
    """Some text that the grammar takes, token by token as its masks allow, ended as soon as it may."""
    following, chance, written = matcher(grammar), random.Random(seed), bytearray()
    mask = masks.allocate_token_bitmask(1, tokenizer().vocab_size)
    while not following.is_accepting():
        if chance.random() < 0.05:  # what ends a text of Gemma's, which else comes by chance alone
            written += gemma.QUOTE.encode()[: following.try_consume_tokens(list(gemma.QUOTE.encode()))]
            continue
        masks.fill_next_token_bitmask(following, mask)
        allowed = [token for token in range(0x20, 0x7F) if mask[0, token // 32] >> (token % 32) & 1]
        token = chance.choice(allowed or [ord("\n")])
        assert following.consume_token(token), following.get_error()
        written.append(token)
        assert len(written) < 2000
    return written.decode()


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("think_tags", [None, THINK])
def test_calls_are_taken_and_nothing_else(tool_format, think_tags):
    grammar = must_call(TOOLS, syntax(tool_format, think_tags=think_tags), MAX_CALLS, no_control)
    whole = WHOLE[tool_format]
    assert takes(grammar, whole)
    assert takes(grammar, f"<think>Hm, <x></think>\n\n{whole}") == (think_tags is not None)
    for wrong in ("", "Hello", whole[:-1], whole + " and", whole.replace("get_weather", "get"), f"Well: {whole}"):
        assert not takes(grammar, wrong), wrong


@pytest.mark.parametrize("tool_format", ["hermes", "llama", "mistral"])
def test_arguments_are_as_the_schema_says(tool_format):
    grammar, whole = must_call(TOOLS, syntax(tool_format), MAX_CALLS, no_control), WHOLE[tool_format]
    for arguments in ("{}", '{"city": 5}', '{"city": "Rome, Italy"}', '{"city": "Rome", "x": 1}'):
        assert not takes(grammar, whole.replace(ROME, arguments))
    assert takes(grammar, whole.replace(ROME, '{"city": "Rome", "days": 2.5}'))
    assert takes(grammar, whole.replace("get_weather", "now").replace(ROME, "{}"))


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_thought_that_the_prompt_began_is_ended_first(tool_format):
    grammar = must_call(TOOLS, syntax(tool_format, think_tags=THINK, is_thinking=True), MAX_CALLS, no_control)
    assert takes(grammar, f"Hm.\n</think>\n\n{WHOLE[tool_format]}")
    assert not takes(grammar, WHOLE[tool_format])


@pytest.mark.parametrize("tool_format", FORMATS)
def test_several_calls_are_taken_unless_one_is_asked_for(tool_format):
    whole = WHOLE[tool_format]
    twice = {
        "hermes": f"{whole}\n{whole}",
        "llama": f"{whole}; {whole}",
        "mistral": f"{whole[:-1]}, {whole.removeprefix('[TOOL_CALLS][')}",
        "gemma": whole + whole,
    }[tool_format]
    assert takes(must_call(TOOLS, syntax(tool_format), MAX_CALLS, no_control), twice) == (tool_format != "llama")
    assert not takes(must_call(TOOLS, syntax(tool_format), 1, no_control), twice)


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_taken_is_read_as_a_call(tool_format, seed):
    asked = syntax(tool_format, think_tags=THINK if seed % 2 else None)
    reader = AnswerReader(asked)
    brought = reader.feed(walk(must_call(TOOLS, asked, MAX_CALLS, no_control), seed)).and_then(reader.finish())
    assert brought.text == ""
    assert brought.calls
    for call in brought.calls:
        arguments = json.loads(call.arguments)
        if tool_format != "gemma":
            jsonschema.validate(arguments, SCHEMA if call.name == "get_weather" else {"maxProperties": 0})


def test_marks_that_are_control_tokens_are_these_tokens():
    following = matcher(must_call(TOOLS, syntax("mistral"), MAX_CALLS, control_id))
    opening, arguments = map(control_id, ("[TOOL_CALLS]", "[ARGS]"))
    calls = [opening, *b"get_weather", arguments, *ROME.encode(), opening, *b"now", arguments, *b"{}"]
    assert following.try_consume_tokens(calls) == len(calls)
    assert following.is_accepting()
    for tags in (THINK, ("[THINK]", "[/THINK]")):
        following = matcher(must_call(TOOLS, syntax("llama", think_tags=tags), MAX_CALLS, control_id))
        tokens = [control_id(tags[0]), *b"Hm <", control_id(tags[1]), *WHOLE["llama"].encode()]
        assert following.try_consume_tokens(tokens) == len(tokens)
        assert following.is_accepting()


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize(
    "content", [Grammar.of_json_schema({"const": "Yes"}), Grammar.of_choices(['"Yes"']), Grammar.of_regex('"Yes"')]
)
def test_an_answer_calls_or_is_as_its_form_says(tool_format, content):
    grammar = may_call(TOOLS, syntax(tool_format, think_tags=THINK), MAX_CALLS, content, no_control)
    for text in (WHOLE[tool_format], '"Yes"', '<think>Hm</think>\n"Yes"'):
        assert takes(grammar, text)
    for text in ("Yes", "", f'"Yes"{WHOLE[tool_format]}'):
        assert not takes(grammar, text)


def test_a_model_that_thinks_does_so_before_its_form():
    content = Grammar.of_json_schema({"const": "Yes"})
    assert after_thought(AnswerSyntax(), content, no_control) is content
    grammar = after_thought(AnswerSyntax(think_tags=THINK), content, no_control)
    assert takes(grammar, '"Yes"')
    assert takes(grammar, '<think>Hm</think>\n\n"Yes"')
    begun = after_thought(AnswerSyntax(think_tags=THINK, is_thinking=True), content, control_id)
    following, tokens = matcher(begun), [*b"Hm", control_id("</think>"), *b'"Yes"']
    assert following.try_consume_tokens(tokens) == len(tokens)


def test_strict_tools_hold_in_free_text():
    grammar = strict_if_called(TOOLS, {"get_weather"}, syntax("hermes"), MAX_CALLS, no_control)
    assert grammar is not None
    call = WHOLE["hermes"]
    for text in ("Hello.", call, f"Well.\n{call}\n{call}", call.replace("get_weather", "now")):
        assert takes(grammar, text)
    assert not takes(grammar, call.replace("Rome", "Rome, Italy"))
    assert not takes(grammar, call.replace("get_weather", "get"))
    for tool_format in ("llama", "mistral", "gemma"):
        assert strict_if_called(TOOLS, {"get_weather"}, syntax(tool_format), MAX_CALLS, no_control) is None


@pytest.mark.parametrize("think_tags", [None, THINK])
@pytest.mark.parametrize("tool_format", FORMATS)
def test_strict_tools_hold_where_a_control_token_marks_calls(tool_format, think_tags):
    asked = syntax(tool_format, think_tags=think_tags)
    grammar = strict_if_called(TOOLS, {"get_weather"}, asked, MAX_CALLS, control_id)
    assert grammar is not None
    call = WHOLE[tool_format]
    if tool_format == "mistral":
        call = f"[TOOL_CALLS]get_weather[ARGS]{ROME}"
    texts = [
        "Hello.",
        "Say {no} more.",
        call,
        call.replace("get_weather", "now"),
        call.replace("get_weather", "now").replace("Rome", "x" * 20),
    ]
    for text in texts:
        assert takes(grammar, text, control_id), text
    assert takes(grammar, f"Well.\n{call}", control_id)  # of Llama's it is a text
    assert takes(grammar, f"<think>Hm</think>\n{call}", control_id) == (think_tags is not None)
    wrong = ("<escape>Rome<escape>", "5") if tool_format == "gemma" else ("Rome", "Rome, Italy")
    for text in (
        call.replace(*wrong),
        call.replace("get_weather", "get"),
        call[:-1],
        f"<|python_tag|>{call}",
    ):
        assert not takes(grammar, text, control_id), text


@pytest.mark.parametrize("parameters", ["5", "{", "[" * 9999])
def test_parameters_that_are_no_schema_are_refused(parameters):
    with pytest.raises(RefusedError, match="the parameters of the tool 'a'"):
        must_call([Tool(name="a", parameters=parameters)], syntax("hermes"), 1, no_control)
