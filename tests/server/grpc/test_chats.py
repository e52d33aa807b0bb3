"""Chats over the wire: tools, calls, results, thoughts."""

import asyncio

import grpc
import pytest
from slipstream.engine_impl.text.chat import Call, Chat, TemplateFacts, Tool, Turn
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.server.grpc.messages import read_chat, write_chat
from slipstream.server.request.answer import Answer
from slipstream.server.request.chat import ChatCall

from tests.scripted import Scripted
from tests.server.calls import chat_request, events, refusal, serving

PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
WHOLE = ChatCall(
    chat=Chat(
        turns=(
            Turn(role="user", content="Hi", name="Bob"),
            Turn(role="assistant", reasoning="Hm", calls=(Call(id="1", name="get_weather", arguments=PARIS),)),
            Turn(role="tool", content="Sunny", call_id="1", name="get_weather"),
        ),
        tools=(Tool(name="get_weather", description="Of a city.", parameters='{"type": "object"}'), Tool(name="now")),
        documents="[{}]",
        template_kwargs='{"a": 1}',
        enable_thinking=False,
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    tool_choice="required",
    tool_name="now",
    parallel_tool_calls=False,
    strict=frozenset({"now"}),
)
PLAIN = ChatCall(chat=Chat(turns=(Turn(role="user", content="Hi"),)))


@pytest.mark.parametrize("call", [WHOLE, PLAIN])
def test_a_chat_comes_as_it_was_sent(call):
    message = pb.DecodeRequest.Chat()
    write_chat(message, call)
    assert read_chat(pb.DecodeRequest.Chat.FromString(message.SerializeToString())) == call


def test_what_is_absent_is_as_over_http():
    message = pb.DecodeRequest.Chat(messages=[pb.DecodeRequest.Message(role="user", content="Hi")])
    assert read_chat(message) == PLAIN
    message.continue_final_message = True
    assert not read_chat(message).chat.add_generation_prompt


async def called(script, facts):
    """The answer of a model that says so, which thinks, says something and calls a tool."""
    async with serving(Scripted(script, facts)) as (_, channel):
        request = chat_request(("user", "Hi"), max_tokens=300)
        request.messages.tools.add(name="get_weather")
        told = Answer.of(1)
        for event in await events(channel, request):
            told.grow(event)
    (sample,) = told.samples
    assert (sample.text, sample.reasoning, sample.finish_reason) == ("Look.", "Hm", "tool_calls")
    return sample


def test_channels_are_told_apart():
    async def scenario():
        script = (
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary<|message|>Look.<|end|>"
            f"<|start|>assistant<|channel|>commentary to=functions.get_weather json<|message|>{PARIS}"
        )
        facts = TemplateFacts(tool_format="harmony", writes_tools=True)
        sample = await called(script, facts)
        assert sample.shown == f"Hm\n\nLook.\n[calls get_weather] {PARIS}"

    asyncio.run(scenario())


def test_calls_and_thoughts_are_told_apart():
    async def scenario():
        facts = TemplateFacts(think_tags=("<think>", "</think>"))
        sample = await called(f"<think>Hm</think>Look.\n{CALL}", facts)
        (call,) = sample.as_json()["tool_calls"]
        assert (call["name"], call["arguments"]) == ("get_weather", PARIS)
        assert sample.shown == f"Hm\n\nLook.\n[calls get_weather] {PARIS}"

    asyncio.run(scenario())


def test_roles_are_those_of_http():
    async def scenario():
        engine = Scripted("Ok.")
        async with serving(engine) as (_, channel):
            for role in ("function", "User", ""):
                code, details = await refusal(channel, chat_request((role, "Hi")))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert f"messages[0].role={role!r} must be one of system, developer, user, assistant, tool" in details
            await events(channel, chat_request(("developer", "Be"), ("tool", "5")))
            assert [turn.role for turn in engine.tokenizer.chats[-1].turns] == ["system", "tool"]

    asyncio.run(scenario())


def test_bad_chats_are_refused():
    async def scenario():
        async with serving(Scripted("Ok.")) as (_, channel):
            request = chat_request(("user", "Hi"))
            request.messages.tool_choice = "any"
            assert "tool_choice='any' must be one of" in (await refusal(channel, request))[1]
            request.messages.tool_choice, request.messages.tool_name = "", "now"
            assert "tool_choice='now' needs tools" in (await refusal(channel, request))[1]

    asyncio.run(scenario())
