"""What an answer must look like, as HTTP's clients say it."""

import asyncio
import json
from typing import Any

import pytest
from openai import BadRequestError
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.http.bodies import ChatBody, CompletionBody
from slipstream.server.request.grammar import MAX_DEPTH, MAX_GRAMMAR, Grammar

from tests.fakes import FakeEngine
from tests.server.http.serving import serving

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
BODIES: dict[Any, dict[str, Any]] = {
    CompletionBody: {"prompt": "a", "max_tokens": 9},
    ChatBody: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
}
TAG = {"structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f="]}
OF_TAG = Grammar.of_structural_tag([("<f=a>", SCHEMA, "</f>")], ["<f="])
OF_SCHEMA, OBJECT = Grammar.of_json_schema(SCHEMA), Grammar.of_json_object()


def asked(kind, fields) -> Grammar | None:
    raw = json.dumps(BODIES[kind] | fields).encode()
    (request,) = kind.read(raw).requests("id", FakeEngine(), lambda number: lambda event: None)
    return request.grammar


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OBJECT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "description": "d", "schema": SCHEMA, "strict": True},
                }
            },
            OF_SCHEMA,
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}}, OF_SCHEMA),
        ({"response_format": {"type": "structural_tag", **TAG}}, OF_TAG),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, OF_SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, OF_SCHEMA),
        ({"structured_outputs": {"json": True}}, Grammar.of_json_schema(True)),
        ({"structured_outputs": {"json_object": True}}, OBJECT),
        ({"structured_outputs": {"json_object": False, "regex": "a+"}}, Grammar.of_regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar.of_choices(["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar.of_lark('start: "a"')),
        ({"structured_outputs": {"structural_tag": json.dumps({"type": "structural_tag", **TAG})}}, OF_TAG),
        ({"guided_json": SCHEMA}, OF_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, OF_SCHEMA),
        ({"guided_regex": "a+"}, Grammar.of_regex("a+")),
        ({"guided_choice": ["a"]}, Grammar.of_choices(["a"])),
        ({"guided_grammar": 'root ::= "a"', "guided_json": None}, Grammar.of_lark('root ::= "a"')),
    ],
    ids=lambda value: str(value)[:60],
)
def test_every_way_to_say_it(kind, fields, grammar):
    assert asked(kind, fields) == grammar


DEEP: Any = {}
for _ in range(MAX_DEPTH):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "response_format",
            "response_format and guided_regex both say what the answer must look like; send one of them",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.regex",
            "structured_outputs.regex and structured_outputs.choice both say",
        ),
        ({"response_format": "json"}, "response_format", "response_format='json': Input should be an object"),
        ({"response_format": {}}, "response_format.type", "response_format.type is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml' must be text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema is missing",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format", 'must be {"structures": ['),
        (
            {"structured_outputs": {"structural_tag": '{"format": {}}'}},
            "structured_outputs.structural_tag",
            "structured_outputs.structural_tag.format is not supported; send structures and triggers",
        ),
        (
            {"structured_outputs": {"structural_tag": json.dumps(TAG | {"triggers": ["x"]})}},
            "structured_outputs.structural_tag",
            "'<f=a>' begins with none of the triggers",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "structured_outputs.json is no JSON"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "must be a JSON object"),
        ({"structured_outputs": {"json": "[" * 9999}}, "structured_outputs.json", "is no JSON: maximum recursion"),
        ({"structured_outputs": {"json": False}}, "structured_outputs.json", "the schema is false, which describes"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "the regex is empty"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "0 choices must be from 1 to 1000"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "a choice is empty"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar", "the grammar is empty"),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
            "structured_outputs.disable_any_whitespace is not supported; leave it out",
        ),
        ({"guided_choice": ["a"] * 1001}, "guided_choice", "has 1001 entries and may have 1000"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]", "guided_choice[1]=1: Input should be a valid string"),
        ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json", "'x-guidance', which is the compiler's"),
        ({"guided_json": DEEP}, "guided_json", f"more than {MAX_DEPTH} levels"),
        ({"guided_json": {"const": "a" * MAX_GRAMMAR}}, "guided_json", f"may have {MAX_GRAMMAR}; send a smaller"),
        ({"guided_regex": "bad"}, None, "the grammar cannot be compiled: it is bad"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(fields, param, message):
    async def scenario():
        async with serving() as (_, client):
            with pytest.raises(BadRequestError) as refused:
                await client.chat.completions.create(model="fake", **BODIES[ChatBody], extra_body=fields)
            assert message in str(refused.value.message)
            assert refused.value.param == param

    if param is None or "both" in message:  # one of each kind through a whole server
        return asyncio.run(scenario())
    with pytest.raises(RefusedError) as refused:
        asked(ChatBody, fields)
    assert message in str(refused.value)
    assert getattr(refused.value, "field", None) == param
    return None


def test_openais_client_gets_what_it_asked_for_whole_and_streamed():
    """The fake answers "[]" to any schema."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}

    async def scenario():
        async with serving() as (_, client):
            body = BODIES[ChatBody] | {"model": "fake", "response_format": form}
            (choice,) = (await client.chat.completions.create(**body)).choices
            assert (choice.message.content, choice.finish_reason) == ("[]", "stop")
            chunks = [chunk async for chunk in await client.chat.completions.create(**body, stream=True)]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "[]"
            assert chunks[-1].choices[0].finish_reason == "stop"
            extra = {"structured_outputs": {"choice": ["hello"]}, "return_token_ids": True}
            answer = await client.completions.create(
                model="fake", prompt=["a", "b"], n=2, max_tokens=4, extra_body=extra
            )
            assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("hell", "length")] * 4

    asyncio.run(scenario())
