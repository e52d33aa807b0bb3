"""Answers' texts, taken apart: thoughts, calls, content, however the text is cut into pieces."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.server.dialects.parts import Brought, CallPart
from slipstream.server.dialects.syntax import FORMATS, AnswerReader, AnswerSyntax

TOOLS = frozenset({"get_weather", "add"})
THINK = ("<think>", "</think>")


def form(tool_format, **more):
    return AnswerSyntax(tool_format=tool_format, tools=TOOLS, **more)


def read(text, asked: AnswerSyntax, *cuts):
    """What the text brings, cut at these places."""
    numbers = itertools.count()
    reader, brought = AnswerReader(asked, lambda: f"id{next(numbers)}"), Brought()
    edges = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        brought = brought.and_then(reader.feed(text[start:end]))
    return brought.and_then(reader.finish())


def calls(*named):
    """As they come of one answer."""
    return tuple(
        CallPart(index=index, id=f"id{index}", name=name, arguments=arguments)
        for index, (name, arguments) in enumerate(named)
    )


PARIS = '{"city": "Paris"}'
ADD = '{"a": 1, "b": [-2.5e3, null, {"c": "\\u00e9\\n"}]}'

HERMES = '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>'
ONE = Brought("", "", calls(("get_weather", PARIS)))
TWO = Brought("", "", calls(("get_weather", PARIS), ("add", ADD)))


@pytest.mark.parametrize(
    ("tool_format", "text", "expected"),
    [
        ("hermes", HERMES % PARIS, ONE),
        ("hermes", "Let me look.\n" + HERMES % PARIS + "\n", ONE._replace(text="Let me look.")),
        ("hermes", "\n\n" + HERMES % PARIS + "\nDone.", ONE._replace(text="Done.")),
        ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>', ONE),
        ("hermes", f'<tool_call>{{"name":"get_weather","parameters":{PARIS}, "id": 5}}</tool_call>', ONE),
        ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}</tool_call>', ONE),
        ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(PARIS)}}}</tool_call>', ONE),
        ("hermes", '<tool_call>{"name": "add"}</tool_call>', Brought("", "", calls(("add", "{}")))),
        ("hermes", HERMES % PARIS + f'\n<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>', TWO),
        ("hermes", f'<tool_call><tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>',
         ONE._replace(text="<tool_call>")),
        ("llama", f'{{"name": "get_weather", "parameters": {PARIS}}}', ONE),
        ("llama", f'\n<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}\n', ONE),
        ("llama", f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "add", "parameters": {ADD}}}', TWO),
        ("llama", f'{{"name": "get_weather", "parameters": {PARIS}}};or not', ONE._replace(text=";or not")),
        ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', ONE),
        ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}, "id": "abcdefghi"}},'
         f' {{"name": "add", "arguments": {ADD}}}]', TWO),
        ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{ADD}", TWO),
        ("mistral", f"Hm. [TOOL_CALLS]get_weather{PARIS}", ONE._replace(text="Hm.")),
        ("gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>", ONE),
        ("gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}", ONE),
        ("gemma", "<start_function_call>call:add{a:1,b:[-2.5,true,{c:<escape>{,}<escape>}],d:[]}<end_function_call>",
         Brought("", "", calls(("add", '{"a": 1, "b": [-2.5, true, {"c": "{,}"}], "d": []}')))),
    ],
)  # fmt: skip
def test_calls_as_models_write_them(tool_format, text, expected):
    assert read(text, form(tool_format)) == expected


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("hermes", "No call. "),
        ("hermes", "\n \n"),
        ("hermes", "<tool_call>get_weather</tool_call>"),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": 5}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": "5"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", '),
        ("hermes", "<tool_c"),
        ("hermes", " <tool_call> <tool_call> "),
        ("llama", '{"city": "Paris"} is JSON'),
        ("llama", '  {"name": "other", "parameters": {}}'),
        ("llama", "<|python_tag|>print(1)"),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", "[TOOL_CALLS]other[ARGS]{}"),
        ("mistral", "[TOOL_CALLS] [1]"),
        ("mistral", "[TOOL_CALLS] " + "a" * 300 + "{"),
        ("gemma", "<start_function_call>call:add{a:}<end_function_call>"),
        ("gemma", "<start_function_call>call:add{a:1<end_function_call>"),
        ("gemma", "<start_function_call>call:add{a:<escape>x}<end_function_call>"),
        ("gemma", "<start_function_call>call:add" + "{a:" * 100 + "<end_function_call>"),
    ],
)
def test_what_is_no_call_is_content_as_it_stands(tool_format, text):
    assert read(text, form(tool_format)) == Brought(text)


def test_arguments_that_break_off_end_their_call_and_the_rest_is_content():
    """They were told already when they broke."""
    text = '<tool_call>{"name": "add", "arguments": {"a": 1, b}}</tool_call>'
    assert read(text, form("hermes")) == Brought("b}}</tool_call>", "", calls(("add", '{"a": 1, ')))
    assert read('<tool_call>{"name": "add", "arguments": {"a": "x', form("hermes")) == Brought(
        "", "", calls(("add", '{"a": "x'))
    )


def test_arguments_come_as_they_are_written():
    reader = AnswerReader(form("hermes"), lambda: "id")
    assert reader.feed('<tool_call>\n{"name": "add", "argu') == Brought()
    assert reader.feed('ments": {"a"') == Brought("", "", (CallPart(index=0, id="id", name="add", arguments='{"a"'),))
    assert reader.feed(": 1") == Brought("", "", (CallPart(index=0, arguments=": 1"),))
    assert reader.feed("}}\n</tool") == Brought("", "", (CallPart(index=0, arguments="}"),))


def test_an_answer_of_one_call_at_most_is_done_behind_it():
    for tool_format, text in (
        ("hermes", HERMES % PARIS),
        ("llama", f'{{"name": "get_weather", "parameters": {PARIS}}}'),
        ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}, '),
        ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{PARIS}"),
        ("gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"),
    ):
        asked = form(tool_format, at_most_one_call=True)
        assert read(f"{text} and so on", asked) == ONE
        reader = AnswerReader(asked)
        reader.feed(f"{text} and")
        assert reader.is_done


@pytest.mark.parametrize(
    ("text", "asked", "expected"),
    [
        ("<think>\nWell.\n</think>\n\nYes.", AnswerSyntax(think_tags=THINK), Brought("Yes.", "Well.")),
        ("\n<think></think>Yes.\n", AnswerSyntax(think_tags=THINK), Brought("Yes.\n")),
        ("Well.\n</think>\n\nYes.", AnswerSyntax(think_tags=THINK, is_thinking=True), Brought("Yes.", "Well.")),
        ("  Well. ", AnswerSyntax(think_tags=THINK, is_thinking=True), Brought("", "Well.")),
        (" Yes <think> no.", AnswerSyntax(think_tags=THINK), Brought(" Yes <think> no.")),
        ("<thin ice", AnswerSyntax(think_tags=THINK), Brought("<thin ice")),
        ("<think>Call!</think>\n" + HERMES % PARIS, form("hermes", think_tags=THINK), ONE._replace(reasoning="Call!")),
        ("<think>" + HERMES % PARIS, form("hermes", think_tags=THINK), Brought("", HERMES % PARIS)),
    ],
)
def test_thoughts(text, asked, expected):
    assert read(text, asked) == expected


SNIPPETS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<start_function_call>"),
    *("<end_function_call>", "<escape>", "call:add{a:", "<think>", "</think>", '{"name": "add", "arguments": '),
    *('{"name": "add", "parameters": {}}', '"arguments": ', '{"a": 1}', "{", "}", "[", "]", '"', "\\", ",", ":", ";"),
    *(" ", "\n", "x", "é", "1", "-", "0.5e+", "true", "add", HERMES % PARIS),
]
TEXTS = st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join)
FORMS = st.builds(
    AnswerSyntax,
    tool_format=st.sampled_from([None, *FORMATS]),
    tools=st.just(TOOLS),
    at_most_one_call=st.booleans(),
    think_tags=st.sampled_from([None, THINK]),
    is_thinking=st.booleans(),
)


@settings(max_examples=250, deadline=None)
@given(TEXTS, FORMS, st.data())
def test_where_the_pieces_end_changes_nothing(text, asked, data):
    whole = read(text, asked)
    assert read(text, asked, *range(1, len(text))) == whole
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    assert read(text, asked, *cuts) == whole


@settings(max_examples=200, deadline=None)
@given(TEXTS, FORMS)
def test_a_text_without_calls_is_all_there(text, asked):
    """But for blanks and the tags of thoughts."""
    brought = read(text, asked)
    if not brought.calls:
        assert without_tags(brought.reasoning + brought.text) == without_tags(text)


def without_tags(text):
    for tag in THINK:
        text = text.replace(tag, "")
    return "".join(text.split())


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8,
), st.booleans())  # fmt: skip
def test_any_json_is_taken_as_arguments(value, ascii_only):
    arguments = json.dumps({"value": value}, ensure_ascii=ascii_only)
    text = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    assert read(text, form("hermes"), *range(len(text))) == Brought("", "", calls(("add", arguments)))


def test_marks_without_end_take_no_more_than_their_share_of_time():
    """Each mark might be the beginning of a call: none is looked at again and again."""
    for tool_format in FORMATS:
        for unit in ('<tool_call>{"a', "[TOOL_CALLS][", "<start_function_call>call:add{a:<escape>", "<|python_tag|>{"):
            text = unit * 3000
            assert read(text, form(tool_format)).text == text
