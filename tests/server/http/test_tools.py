"""Tools, thoughts and whole conversations over HTTP, asked by OpenAI's own client."""

import asyncio
import json

import aiohttp
import pytest
from openai import BadRequestError
from slipstream.engine_impl.text.chat import Call, TemplateFacts, Tool, Turn
from slipstream.server.config import ChatConfig

from tests.scripted import Scripted
from tests.server.http.serving import serving, url

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Of a city.", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
CALLS = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
HI = [{"role": "user", "content": "Hi"}]
THINKS = TemplateFacts(think_tags=("<think>", "</think>"), variables=frozenset({"enable_thinking"}))


async def chat(client, messages=HI, **more):
    fields = {"model": "fake", "messages": messages, "tools": [WEATHER, NOW], "temperature": 0} | more
    return await client.chat.completions.create(**fields)


def asked(script, check, facts=TemplateFacts(), **config):  # noqa: B008
    """Runs `check(client, engine)` against a server whose model answers `script`."""

    async def scenario():
        engine = Scripted(script, facts)
        async with serving(engine, **config) as (server, client):
            await check(client, engine, server)

    asyncio.run(scenario())


def test_calls_are_told_as_openai_tells_them():
    async def check(client, engine, server):
        (choice,) = (await chat(client)).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        first, second = choice.message.tool_calls
        assert (first.type, first.function.name, first.function.arguments) == ("function", "get_weather", PARIS)
        assert (second.function.name, second.function.arguments) == ("now", "{}")
        assert first.id.startswith("call_")
        assert first.id != second.id
        alone = (await chat(client, parallel_tool_calls=False)).choices[0]
        assert [call.function.name for call in alone.message.tool_calls] == ["get_weather"]
        assert alone.finish_reason == "tool_calls"
        cut = (await chat(client, max_tokens=70)).choices[0]
        assert cut.finish_reason == "length"

    asked(CALLS, check)


def test_a_call_alone_has_no_content():
    async def check(client, engine, server):
        message = (await chat(client)).choices[0].message
        assert message.content is None
        assert len(message.tool_calls) == 1

    asked(CALL, check)


def test_a_stream_tells_a_call_by_and_by():
    async def check(client, engine, server):
        deltas = [chunk.choices[0] async for chunk in await chat(client, stream=True)]
        assert deltas[0].delta.role == "assistant"
        assert deltas[-1].finish_reason == "tool_calls"
        assert "".join(choice.delta.content or "" for choice in deltas) == "Let me see."
        parts = [part for choice in deltas for part in choice.delta.tool_calls or ()]
        heads = [part for part in parts if part.id]
        assert [(part.index, part.type, part.function.name) for part in heads] == [
            (0, "function", "get_weather"), (1, "function", "now"),
        ]  # fmt: skip
        assert all(part.function.name is None for part in parts if not part.id)
        for index, arguments in enumerate((PARIS, "{}")):
            told = [part.function.arguments for part in parts if part.index == index]
            assert "".join(told) == arguments
        assert len(parts) > len(heads)

    asked(CALLS, check)


def test_openais_stream_helper_puts_calls_together():
    async def check(client, engine, server):
        strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
        async with client.chat.completions.stream(model="fake", messages=HI, tools=[strict]) as stream:
            names = [event.name async for event in stream if event.type == "tool_calls.function.arguments.done"]
            (call,) = (await stream.get_final_completion()).choices[0].message.tool_calls
        assert names == ["get_weather"]
        assert call.function.parsed_arguments == {"city": "Paris"}

    asked(CALL, check)


def test_a_conversation_with_calls_and_results_is_given_to_the_template():
    async def check(client, engine, server):
        call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
        history = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "function_call": None},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Sunny"}]},
            {"role": "assistant", "content": "Fine", "reasoning_content": "Hm"},
            {"role": "developer", "content": "Go"},
        ]
        await chat(client, history, tool_choice="none")
        await chat(client, history)
        without, with_tools = engine.tokenizer.chats
        assert with_tools.turns == (
            Turn(role="user", content="Hi"),
            Turn(role="assistant", calls=(Call(id="call_1", name="get_weather", arguments=PARIS),)),
            Turn(role="tool", content="Sunny", call_id="call_1"),
            Turn(role="assistant", content="Fine", reasoning="Hm"),
            Turn(role="system", content="Go"),
        )
        assert with_tools.tools == (
            Tool(name="get_weather", description="Of a city.", parameters=json.dumps(SCHEMA)), Tool(name="now"),
        )  # fmt: skip
        assert without.tools == ()
        assert without.as_text
        assert with_tools.as_text

    asked("Ok.", check)


def test_without_tools_an_answer_is_its_text():
    async def check(client, engine, server):
        for more in ({"tools": []}, {"tool_choice": "none"}):
            (choice,) = (await chat(client, **more)).choices
            assert (choice.message.content, choice.finish_reason) == (CALLS, "stop")
            assert choice.message.tool_calls is None
        assert not engine.tokenizer.chats[0].as_text

    asked(CALLS, check)


def test_a_templates_own_form_is_read():
    async def check(client, engine, server):
        (call,) = (await chat(client)).choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("get_weather", PARIS)
        assert not engine.tokenizer.chats[0].as_text

    script = f'{{"name": "get_weather", "parameters": {PARIS}}}'
    asked(script, check, TemplateFacts(tool_format="llama", writes_tools=True))
    asked(script, check, TemplateFacts(writes_tools=True), chat=ChatConfig(tool_format="llama"))


@pytest.mark.parametrize("is_told", [True, False])
def test_thoughts_are_told_apart(is_told):
    async def check(client, engine, server):
        message = (await chat(client, tools=[])).choices[0].message.to_dict()
        expected = {"content": "Yes.", "reasoning_content": "Is it?"} if is_told else {"content": script}
        assert message == {"role": "assistant"} | expected
        chunks = [chunk.choices[0].delta.to_dict() async for chunk in await chat(client, tools=[], stream=True)]
        assert chunks[0]["role"] == "assistant"
        for name, text in expected.items():
            assert "".join(chunk.get(name, "") for chunk in chunks) == text
        if is_told:
            await chat(client, tools=[], extra_body={"chat_template_kwargs": {"enable_thinking": False}})
            await chat(client, tools=[], extra_body={"enable_thinking": False})
            kwargs, own = engine.tokenizer.chats[-2:]
            assert kwargs.template_kwargs == '{"enable_thinking": false}'
            assert own.enable_thinking is False

    script = "<think>\nIs it?\n</think>\n\nYes."
    asked(script, check, THINKS, chat=ChatConfig(reasoning_format="auto" if is_told else "none"))


def test_documents_and_the_last_message():
    async def check(client, engine, server):
        last = [*HI, {"role": "assistant", "content": "It is"}]
        await chat(client, last, extra_body={"continue_final_message": True, "documents": [{"text": "A"}]})
        await chat(client, last, extra_body={"add_generation_prompt": False})
        await chat(client, last)
        goes_on, open_end, usual = engine.tokenizer.chats
        assert (goes_on.continue_final_message, goes_on.add_generation_prompt) == (True, False)
        assert goes_on.documents == '[{"text": "A"}]'
        assert (open_end.continue_final_message, open_end.add_generation_prompt) == (False, False)
        assert (usual.continue_final_message, usual.add_generation_prompt) == (False, True)

    asked("Ok.", check)


def message(**more):
    return {"messages": [{"role": "user", "content": "Hi"} | more]}


def called(**more):
    return {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}} | more


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (message(role="tools"), "messages[0].role", "must be one of system, developer, user, assistant, tool"),
        (message(tool_calls=[called()]), "messages[0].tool_calls", "are the assistant's; its role is 'user'"),
        (message(tool_call_id="1"), "messages[0].tool_call_id", "is of a tool's message"),
        (message(reasoning_content="Hm"), "messages[0].reasoning_content", "is the assistant's"),
        (message(name="Bob"), "messages[0].name", "='Bob' is not read by the model's chat template"),
        (message(role="assistant", prefix=True), "messages[0].prefix", "prefix=True is not supported"),
        (message(role="assistant", function_call={"name": "now"}), "messages[0].function_call", "is not supported"),
        (message(role="assistant", content=None), "messages[0].content", "is missing"),
        (message(role="assistant", tool_calls=[called(type="custom")]), "messages[0].tool_calls[0].type", "'custom'"),
        (message(role="assistant", tool_calls=[called(function={"name": "a b"})]),
         "messages[0].tool_calls[0].function.name", "'a b' must be 1 to 64 letters"),
        (message(role="assistant", tool_calls=[{"function": {}}]), "messages[0].tool_calls[0].function.name",
         "is missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "'web_search' is not supported; send functions alone"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "'get_weather' is there twice"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "must be 1 to 64"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
         "tools[0].function.parameters", "must be an object"),
        ({"tools": [{"type": "function", "function": {"name": f"a{n}"}} for n in range(129)]}, "tools",
         "129 are too many; send at most 128"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": "x" * (1 << 17)}}]}, "tools",
         "characters are too many"),
        ({"tool_choice": "required"}, "tool_choice", "'required' needs tools"),
        ({"tool_choice": "any"}, "tool_choice", "must be one of none, auto, required"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}}, "tool_choice",
         "'then' is none of the tools"),
        ({"tool_choice": 5}, "tool_choice", "must be none, auto, required, or"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type", "Input should be 'function'"),
        ({"functions": [{"name": "a"}]}, "functions", "is not supported"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message",
         "is for add_generation_prompt=false"),
        ({"chat_template_kwargs": {"a": "x" * (1 << 14)}}, "chat_template_kwargs", "are too many"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs", "must be an object"),
        ({"documents": {}}, "documents", "must be a list"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_fields_are_refused_by_name(one_server, body, param, told):
    error = one_server({"messages": HI} | body)
    assert told in error["message"]
    assert error["param"] == param


@pytest.fixture(scope="module")
def one_server():
    """Posts a chat that must be refused; returns its error."""
    loop = asyncio.new_event_loop()
    manager = serving(Scripted("Ok."))
    server, _ = loop.run_until_complete(manager.__aenter__())

    async def post(body):
        async with (
            aiohttp.ClientSession() as session,
            session.post(url(server, "/v1/chat/completions"), json=body) as answer,
        ):
            assert answer.status == 400
            return (await answer.json())["error"]

    yield lambda body: loop.run_until_complete(post(body))
    loop.run_until_complete(manager.__aexit__(None, None, None))
    loop.close()


def test_what_must_be_called_is_a_grammar():
    async def check(client, engine, server):
        named = {"type": "function", "function": {"name": "now"}}
        answer_form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 5}}}
        strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
        for more, rules in (
            ({"tool_choice": "required"}, ("get_weather", "now")),
            ({"tool_choice": named}, ("now",)),
            ({"tools": [strict]}, ("get_weather",)),
            ({"response_format": answer_form}, ("get_weather", "now", "@content", "const")),
            ({"response_format": answer_form, "tool_choice": "none"}, ("const",)),
            ({"response_format": answer_form, "tool_choice": "required"}, ("get_weather", "now")),
        ):
            await chat(client, **more)
            known = ("get_weather", "now", "@content", "const")
            assert [rule for rule in known if rule in engine.tokenizer.grammars[-1]] == list(rules)
        asked = len(engine.tokenizer.grammars)
        await chat(client)
        await chat(client, tools=[strict], tool_choice="none")
        assert len(engine.tokenizer.grammars) == asked

    asked(CALL, check)


def test_a_conversation_may_be_long():
    """Large bodies are read in another process: tools and calls come back whole."""

    async def check(client, engine, server):
        padded = {"type": "function", "function": {"name": "pad", "description": "x" * (1 << 16)}}
        (call,) = (await chat(client, tools=[WEATHER, padded])).choices[0].message.tool_calls
        assert call.function.arguments == PARIS
        assert [tool.name for tool in engine.tokenizer.chats[0].tools] == ["get_weather", "pad"]
        with pytest.raises(BadRequestError, match="needs tools"):
            await chat(client, tools=[], tool_choice="required", extra_body={"user": "x" * (1 << 16)})

    asked(CALL, check)


CHANNELS = TemplateFacts(tool_format="harmony", writes_tools=True)
HARMONY = (
    "<|channel|>analysis<|message|>Where?<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    f"<|constrain|>json<|message|>{PARIS}"
)
SAID = "<|channel|>analysis<|message|>Well.<|end|><|start|>assistant<|channel|>final<|message|>Sunny."


def test_channels_are_thoughts_content_and_calls():
    async def check(client, engine, server):
        (choice,) = (await chat(client, max_tokens=300)).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.reasoning_content == "Where?"
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("get_weather", PARIS)
        deltas = [chunk.choices[0] async for chunk in await chat(client, stream=True, max_tokens=300)]
        assert "".join(getattr(one.delta, "reasoning_content", "") or "" for one in deltas) == "Where?"
        parts = [part for one in deltas for part in one.delta.tool_calls or ()]
        assert parts[0].function.name == "get_weather"
        assert "".join(part.function.arguments or "" for part in parts) == PARIS
        assert len(parts) > 2
        assert deltas[-1].finish_reason == "tool_calls"
        await chat(client, tool_choice="required", max_tokens=300)
        assert "to=functions." in engine.tokenizer.grammars[-1]

    asked(HARMONY, check, CHANNELS)


def test_channels_without_tools():
    async def check(client, engine, server):
        message = (await chat(client, tools=None, max_tokens=300)).choices[0].message
        assert (message.content, message.reasoning_content) == ("Sunny.", "Well.")
        await chat(client, tools=None, max_tokens=300, response_format={"type": "json_object"})
        assert "final" in engine.tokenizer.grammars[-1]
        if engine.tokenizer.template_facts.writes_tools:
            return
        with pytest.raises(BadRequestError, match="has channels and writes no tools"):
            await chat(client)

    asked(SAID, check, TemplateFacts(tool_format="harmony"))
    asked(SAID, check, CHANNELS)

    async def shown(client, engine, server):
        message = (await chat(client, tools=None, max_tokens=300)).choices[0].message
        assert message.content == "Well.\n\nSunny."

    asked(SAID, shown, CHANNELS, chat=ChatConfig(reasoning_format="none"))
