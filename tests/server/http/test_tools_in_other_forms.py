"""Tools and structured output in /v1/responses and /v1/messages, asked by OpenAI's and Anthropic's own clients."""

import asyncio
import json
from typing import Any

import pytest
from pydantic import BaseModel

from tests.scripted import Scripted
from tests.server.http.serving import anthropics_client_of, serving

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FLAT: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "Of a city.", "parameters": SCHEMA, "strict": False},
    {"type": "function", "name": "now"},
]
OWN: list[Any] = [
    {"name": "get_weather", "description": "Of a city.", "input_schema": SCHEMA},
    {"name": "now", "input_schema": {"type": "object"}, "type": "custom", "cache_control": {"type": "ephemeral"}},
]
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
CALLS = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
HI: Any = [{"role": "user", "content": "Hi"}]


class City(BaseModel):
    city: str


def asked(script, check):
    """Runs `check(OpenAI's client, Anthropic's, the engine)` against a server whose model answers `script`."""

    async def scenario():
        engine = Scripted(script)
        async with serving(engine) as (server, client), anthropics_client_of(server) as other:
            await check(client, other, engine)

    asyncio.run(scenario())


async def respond(client, **more) -> Any:
    return await client.responses.create(**{"model": "fake", "input": "Hi", "tools": FLAT, "temperature": 0} | more)


async def message(client, **more) -> Any:
    fields = {"model": "fake", "max_tokens": 200, "messages": HI, "tools": OWN}
    return await client.messages.create(**fields | {"extra_body": {"temperature": 0}} | more)


def test_a_response_calls_tools():
    async def check(client, other, engine):
        answer = await respond(client)
        text, first, second = answer.output
        assert (answer.status, answer.output_text) == ("completed", "Let me see.")
        assert (text.type, text.status) == ("message", "completed")
        assert (first.type, first.name, first.arguments) == ("function_call", "get_weather", PARIS)
        assert (second.name, second.arguments) == ("now", "{}")
        assert len({text.id, first.id, second.id, first.call_id, second.call_id}) == 5
        assert [tool.name for tool in answer.tools] == ["get_weather", "now"]
        assert answer.tools[0].parameters == SCHEMA
        alone = await respond(client, parallel_tool_calls=False)
        assert [item.type for item in alone.output] == ["message", "function_call"]
        cut = await respond(client, max_output_tokens=70)
        assert (cut.status, cut.output[-1].status) == ("incomplete", "incomplete")
        assert PARIS.startswith(cut.output[-1].arguments)

    asked(CALLS, check)


def test_a_response_streams_its_calls():
    async def check(client, other, engine):
        events = [event async for event in await respond(client, stream=True)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type.removeprefix("response.") for event in events if not event.type.endswith(".delta")]
        call = ["output_item.added", "function_call_arguments.done", "output_item.done"]
        text = ["output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"]
        assert kinds == ["created", "in_progress", *text, *call, *call, "completed"]
        whole = events[-1].response
        for index, item in enumerate(whole.output):
            of_item = [event for event in events if getattr(event, "output_index", None) == index]
            assert (of_item[0].item.id, of_item[0].item.status) == (item.id, "in_progress")
            assert of_item[-1].item == item
            told = "".join(event.delta for event in of_item if event.type.endswith(".delta"))
            assert told == (item.content[0].text if item.type == "message" else item.arguments)
        assert len([event for event in events if event.type.endswith("arguments.delta")]) > 2
        async with client.responses.stream(model="fake", input="Hi", tools=FLAT) as stream:
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["message", "function_call", "function_call"]

    asked(CALLS, check)


def test_a_response_goes_on_behind_what_a_tool_gave():
    items: list[Any] = [
        *HI,
        {"role": "assistant", "content": [{"type": "output_text", "text": "T"}], "id": "msg_1", "status": "completed"},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "now", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "one"}]},
    ]

    async def check(client, other, engine):
        await respond(client, input=items, tools=[])
        _, assistant, *results = engine.tokenizer.chats[-1].turns
        assert (assistant.role, assistant.content) == ("assistant", "T")
        calls = [(call.id, call.name, call.arguments) for call in assistant.calls]
        assert calls == [("c1", "now", "{}"), ("c2", "now", '{"a": 1}')]
        assert [(turn.role, turn.call_id, turn.content) for turn in results] == [
            ("tool", "c1", "noon"), ("tool", "c2", "one"),
        ]  # fmt: skip

    asked("ok", check)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_response_must_call(choice):
    async def check(client, other, engine):
        answer = await respond(client, tool_choice=choice)
        assert [item.type for item in answer.output] == ["function_call"]
        assert answer.tool_choice == choice or answer.tool_choice.name == "get_weather"
        assert ("now" in engine.tokenizer.grammars[-1]) == (choice == "required")
        assert (await respond(client, tool_choice="none")).output_text == CALL

    asked(CALL, check)


def test_responses_of_a_form():
    async def check(client, other, engine):
        parsed = await client.responses.parse(model="fake", input="Hi", text_format=City)
        assert parsed.output_parsed == City(city="Paris")
        (grammar,) = json.loads(engine.tokenizer.grammars[-1])["grammars"]
        assert grammar["json_schema"]["properties"]["city"]["type"] == "string"
        assert parsed.text.format.type == "json_schema"
        told = await respond(client, tools=[], text={"format": {"type": "json_object"}, "verbosity": "medium"})
        assert told.text.format.type == "json_object"
        assert len(engine.tokenizer.grammars) == 2

    asked(PARIS, check)


def test_a_message_uses_tools():
    async def check(client, other, engine):
        answer = await message(other)
        text, first, second = answer.content
        assert (answer.stop_reason, text.text) == ("tool_use", "Let me see.")
        assert (first.type, first.name, first.input) == ("tool_use", "get_weather", {"city": "Paris"})
        assert (second.name, second.input) == ("now", {})
        assert first.id != second.id
        one = {"type": "auto", "disable_parallel_tool_use": True}
        assert len((await message(other, tool_choice=one)).content) == 2
        cut = await message(other, max_tokens=70)
        assert (cut.stop_reason, [block.type for block in cut.content]) == ("max_tokens", ["text"])

    asked(CALLS, check)


def test_a_message_streams_its_calls():
    async def check(client, other, engine):
        kinds, indices = [], []
        async with other.messages.stream(model="fake", max_tokens=200, messages=HI, tools=OWN) as stream:
            async for event in stream:
                if event.type in ("content_block_start", "content_block_stop"):
                    kinds.append(event.type.removeprefix("content_block_"))
                    indices.append(event.index)
            whole = await stream.get_final_message()
        assert (kinds, indices) == (["start", "stop"] * 3, [0, 0, 1, 1, 2, 2])
        assert [block.type for block in whole.content] == ["text", "tool_use", "tool_use"]
        assert [block.input for block in whole.content[1:]] == [{"city": "Paris"}, {}]
        assert whole.stop_reason == "tool_use"

    asked(CALLS, check)


def test_a_message_goes_on_behind_what_a_tool_gave():
    turns: list[Any] = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "T"},
                {"type": "tool_use", "id": "c1", "name": "now", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "noon"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": "none", "is_error": True},
                {"type": "tool_result", "tool_use_id": "c3"},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]

    async def check(client, other, engine):
        await message(other, messages=turns, tools=[])
        _, assistant, *rest = engine.tokenizer.chats[-1].turns
        (called,) = assistant.calls
        assert (assistant.content, called.id, called.name, called.arguments) == ("T", "c1", "now", '{"a": 1}')
        assert [(turn.role, turn.call_id, turn.content) for turn in rest] == [
            ("tool", "c1", "noon"), ("tool", "c2", "Error: none"), ("tool", "c3", ""), ("user", "", "And now?"),
        ]  # fmt: skip
        bare = (await other.messages.count_tokens(model="fake", messages=HI)).input_tokens
        assert (await other.messages.count_tokens(model="fake", messages=HI, tools=OWN)).input_tokens >= bare

    asked("ok", check)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_message_must_call(choice):
    async def check(client, other, engine):
        answer = await message(other, tool_choice=choice)
        assert [block.type for block in answer.content] == ["tool_use"]
        assert ("now" in engine.tokenizer.grammars[-1]) == (choice["type"] == "any")
        assert (await message(other, tool_choice={"type": "none"})).content[0].text == CALL

    asked(CALL, check)


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_messages_of_a_form(field):
    async def check(client, other, engine):
        form = {"type": "json_schema", "schema": SCHEMA}
        more = {field: {"format": form} if field == "output_config" else form}
        answer = await message(other, tools=[], extra_body=more)
        assert json.loads(answer.content[0].text) == {"city": "Paris"}
        (grammar,) = json.loads(engine.tokenizer.grammars[-1])["grammars"]
        assert grammar["json_schema"]["required"] == ["city"]

    asked(PARIS, check)
