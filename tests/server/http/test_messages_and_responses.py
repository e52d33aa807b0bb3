"""POST /v1/messages and /v1/responses, asked by Anthropic's and OpenAI's own clients."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from slipstream.server.config import SecurityConfig

from tests.fakes import CONTROL, FakeEngine
from tests.server.http.serving import anthropics_client_of, serving, url

HI: list[Any] = [{"role": "user", "content": "a"}]
ASK: dict[str, Any] = {"model": "fake", "max_tokens": 3, "messages": HI}
ANSWER: dict[str, Any] = {"model": "fake", "input": "a", "max_output_tokens": 3}


@asynccontextmanager
async def serving_openai(engine=None) -> AsyncIterator[Any]:
    """OpenAI's client."""
    async with serving(engine) as (_, client):
        yield client


@asynccontextmanager
async def serving_anthropic(engine=None, key="none", **config) -> AsyncIterator[tuple[Any, Any]]:
    """The server, and Anthropic's client."""
    async with serving(engine, **config) as (server, _), anthropics_client_of(server, key) as client:
        yield server, client


def test_a_message():
    async def scenario():
        async with serving_anthropic() as (_, client):
            answer = await client.messages.create(**ASK)
            assert (answer.content[0].text, answer.role, answer.model) == ("bcd", "assistant", "fake")
            assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
            assert (answer.usage.input_tokens, answer.usage.output_tokens) == (4, 3)  # "<u>a"
            ended = await client.messages.create(**ASK | {"messages": [{"role": "user", "content": "w"}]})
            assert (ended.content[0].text, ended.stop_reason) == ("xyz", "max_tokens")
            ended = await client.messages.create(**ASK | {"messages": [{"role": "user", "content": "x"}]})
            assert (ended.content[0].text, ended.stop_reason) == ("yz", "end_turn")
            for stop, text in (("fg", "bcde"), (CONTROL, "bcd")):
                met = await client.messages.create(**ASK | {"max_tokens": 20}, stop_sequences=["nope", stop])
                assert (met.content[0].text, met.stop_reason, met.stop_sequence) == (text, "stop_sequence", stop)

    asyncio.run(scenario())


def test_a_message_comes_as_a_stream():
    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(1))
        async with serving_anthropic(engine) as (_, client):
            kinds = []
            async with client.messages.stream(**ASK | {"max_tokens": 6}) as stream:
                async for event in stream:
                    kinds.append(event.type)
                    engine.pace.release()
                whole = await stream.get_final_message()
            assert (whole.content[0].text, whole.stop_reason, whole.usage.output_tokens) == ("bcdefg", "max_tokens", 6)
            assert kinds[:2] == ["message_start", "content_block_start"]
            assert kinds.count("text") > 1
            assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]

    asyncio.run(scenario())


def test_system_turns_and_blocks_reach_the_template():
    async def scenario():
        engine = FakeEngine(max_prefill_length=64, prefill_chunk=64)
        async with serving_anthropic(engine) as (_, client):
            turns = [
                *HI,
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": [{"type": "text", "text": "c"}]},
            ]
            await client.messages.create(
                **ASK | {"messages": turns}, system="S", extra_body={"temperature": 0, "top_k": 3}
            )
            assert engine.log[1] == "prefill <s>S<u>a<a>b<u>c"
            assert engine.samplings[0].top_k == 3
            counted = await client.messages.count_tokens(model="fake", messages=turns, system="S")
            assert counted.input_tokens == len("<s>S<u>a<a>b<u>c")

    asyncio.run(scenario())


def test_anthropics_errors(tmp_path):
    import anthropic

    (tmp_path / "tokens").write_text("secret\n")
    security = SecurityConfig(auth_token_file=tmp_path / "tokens")

    async def scenario():
        async with serving_anthropic(key="secret", security=security) as (server, client):
            assert (await client.messages.create(**ASK)).content[0].text == "bcd", "x-api-key is a token"
            with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
                await client.messages.create(**ASK | {"model": "other"})
            with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
                await client.with_options(api_key="other").messages.create(**ASK)
            for more, message in (
                (
                    {"tools": [{"name": "x", "type": "web_search_20250305"}]},
                    r"tools\[0\].type='web_search.* is not supp",
                ),
                ({"tool_choice": {"type": "most"}}, "tool_choice.type='most' must be auto, any, none, or tool"),
                ({"tool_choice": {"type": "any"}}, "tool_choice='required' needs tools"),
                ({"output_config": {"effort": "low"}}, "output_config.effort='low' is not supported"),
                ({"output_config": {"format": {"type": "x"}}}, "output_config.format.type='x' must be json_schema"),
                ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id is missing"),
                ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking=.* is not supported"),
                ({"messages": []}, "messages is empty"),
                ({"messages": [*HI, {"role": "assistant", "content": "b"}]}, "assistant's turn; none is continued"),
                ({"messages": [{"role": "tool", "content": "b"}]}, r"messages\[0\].role='tool' must be user or"),
                ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type 'image' is not supported"),
                ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
                ({"extra_body": {"temperature": -1}}, "temperature=-1"),
                ({"stop_sequences": [""]}, "a stop string of 0 characters"),
                ({"stop_sequences": ["x"] * 1001}, "stop_sequences=.*has 1001 entries and may have 1000"),
                (
                    {"extra_body": {"system": "S", "messages": HI * 10_000}},
                    "messages=.*has 10001 entries and may have 10000",
                ),
            ):
                with pytest.raises(anthropic.BadRequestError, match=message):
                    await client.messages.create(**ASK | more)
            async with (
                aiohttp.ClientSession(headers={"x-api-key": "secret"}) as session,
                session.post(url(server, "/v1/messages"), json={"messages": HI}) as answer,
            ):
                error = {"type": "invalid_request_error", "message": "max_tokens is missing"}
                assert await answer.json() == {"type": "error", "error": error}

    asyncio.run(scenario())


def test_a_failure_in_anthropics_stream_is_its_last_event():
    import anthropic

    async def scenario():
        engine = FakeEngine(late_errors={1: RuntimeError("boom")}, step_s=0.02)
        async with serving_anthropic(engine) as (_, client):
            with pytest.raises(anthropic.APIStatusError, match="boom"):
                async with client.messages.stream(**ASK | {"max_tokens": 9}) as stream:
                    await stream.get_final_message()

    asyncio.run(scenario())


def test_a_response():
    async def scenario():
        async with serving_openai() as client:
            answer = await client.responses.create(**ANSWER, metadata={"of": "mine"})
            assert (answer.output_text, answer.model, answer.status) == ("bcd", "fake", "incomplete")
            assert answer.incomplete_details.reason == "max_output_tokens"
            assert answer.metadata == {"of": "mine"}
            assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (4, 3, 7)
            whole = await client.responses.create(model="fake", input="x")
            assert (whole.output_text, whole.status, whole.incomplete_details) == ("yz", "completed", None)

    asyncio.run(scenario())


def test_a_response_comes_as_a_stream():
    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(1))
        async with serving_openai(engine) as client:
            events = []
            async for event in await client.responses.create(**ANSWER | {"max_output_tokens": 6}, stream=True):
                events.append(event)
                engine.pace.release()
            engine.pace.release(99)
            assert [event.sequence_number for event in events] == list(range(len(events)))
            kinds = [event.type.removeprefix("response.") for event in events]
            assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
            assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
            deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
            assert len(deltas) > 1
            assert "".join(deltas) == events[-1].response.output_text == "bcdefg"
            async with client.responses.stream(model="fake", input="x") as stream:
                assert (await stream.get_final_response()).output_text == "yz"

    asyncio.run(scenario())


def test_instructions_and_items_reach_the_template():
    async def scenario():
        engine = FakeEngine(max_prefill_length=64, prefill_chunk=64)
        async with serving_openai(engine) as client:
            items: Any = [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
                {"role": "developer", "content": "c"},
            ]
            await client.responses.create(model="fake", input=items, instructions="S")
        assert engine.log[1] == "prefill <s>S<u>a<a>b<s>c"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id='resp_1' is not supported"),
        ({"background": True}, "background=True is not supported"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type='xml' must be"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema is missing"),
        ({"text": {"verbosity": "low"}}, "text.verbosity='low' is not supported"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type='web_search' is not supported"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].name is missing"),
        ({"tool_choice": "most"}, "tool_choice='most' must be one of"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, r"input\[0\].call_id is missing"),
        ({"input": []}, "is empty"),
        ({"extra_body": {"input": HI * 10_000, "instructions": "S"}}, "has 10001 entries and may have 10000"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\].type='item_reference' is not supported"),
        ({"input": [{"role": "tool", "content": "x"}]}, r"input\[0\].role='tool' must be one of"),
        ({"max_output_tokens": 0}, "max_output_tokens=0 must be at least 1"),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_what_a_response_is_not(more, message):
    async def scenario():
        async with serving_openai() as client:
            with pytest.raises(openai.BadRequestError, match=message):
                await client.responses.create(**ANSWER | more)

    asyncio.run(scenario())


def test_a_failure_in_a_response_is_its_last_event():
    async def scenario():
        engine = FakeEngine(late_errors={1: RuntimeError("boom")}, step_s=0.02)
        async with serving_openai(engine) as client:
            stream = await client.responses.create(**ANSWER | {"max_output_tokens": 9}, stream=True)
            last = [event async for event in stream][-1]
            assert (last.type, last.code) == ("error", "engine_failed")
            assert "boom" in last.message

    asyncio.run(scenario())
