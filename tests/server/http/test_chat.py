"""POST /v1/chat/completions and /v1/models, asked by OpenAI's own client."""

import asyncio
from typing import Any, cast

import pytest
from openai import NotFoundError

from tests.fakes import FakeEngine
from tests.server.http.serving import serving

USER = [{"role": "user", "content": "a"}]


async def chat(client, messages=USER, **more):
    return await client.chat.completions.create(**{"model": "fake", "messages": messages, "max_tokens": 3} | more)


def test_messages_are_templated():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, client):
            answer = await chat(client, [{"role": "system", "content": "be"}, *USER])
            (choice,) = answer.choices
            assert (choice.message.role, choice.message.content) == ("assistant", "bcd")
            assert (choice.finish_reason, answer.object) == ("length", "chat.completion")
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 3)
            parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
            await chat(client, [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
        assert [call for call in engine.log if call.startswith("prefill")] == [
            "prefill <s>be<u>a",
            "prefill <s>x<u>A\nB",
        ]

    asyncio.run(scenario())


def test_a_stream_says_once_who_speaks():
    async def scenario():
        async with serving(FakeEngine(max_concurrent_decodes=2, step_s=0.002)) as (_, client):
            stream = await chat(client, n=2, stream=True, stream_options={"include_usage": True})
            *answer, last = [chunk async for chunk in stream]
            deltas = {0: [], 1: []}
            for chunk in answer:
                assert chunk.object == "chat.completion.chunk"
                for choice in chunk.choices:
                    deltas[choice.index].append(choice.delta)
            for index, text in enumerate(("bcd", "lmn")):
                assert [delta.role for delta in deltas[index]] == ["assistant"] + [None] * (len(deltas[index]) - 1)
                assert "".join(delta.content for delta in deltas[index]) == text
            assert last.choices == []
            assert last.usage.total_tokens == 4 + 6

    asyncio.run(scenario())


def test_an_answer_that_is_empty_is_one_chunk():
    """ "z" is answered by the stop token."""

    async def scenario():
        async with serving() as (_, client):
            (chunk,) = [chunk async for chunk in await chat(client, [{"role": "user", "content": "z"}], stream=True)]
            assert (chunk.choices[0].delta.role, chunk.choices[0].delta.content) == ("assistant", "")
            assert chunk.choices[0].finish_reason == "stop"

    asyncio.run(scenario())


def test_openais_own_stream_helper_puts_the_answer_together():
    async def scenario():
        async with (
            serving(FakeEngine(step_s=0.002)) as (_, client),
            client.chat.completions.stream(model="fake", messages=[{"role": "user", "content": "w"}]) as stream,
        ):
            texts = [event.delta async for event in stream if event.type == "content.delta"]
            assert "".join(texts) == "xyz"
            assert (await stream.get_final_completion()).choices[0].message.content == "xyz"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "engine", [FakeEngine(cache_length=40), FakeEngine(page_rows=8, pages=5)], ids=["slot", "pool"]
)
def test_without_a_length_the_answer_may_fill_the_cache(engine):
    async def scenario():
        async with serving(engine) as (_, client):
            for more in ({"max_tokens": None}, {"max_tokens": 9, "max_completion_tokens": 36}):
                answer = await chat(client, [{"role": "user", "content": "\x01"}], **more)
                assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 36)
                assert answer.choices[0].finish_reason == "length"

    asyncio.run(scenario())


def test_the_models_length_is_the_longest_request_that_fits():
    """As vLLM tells it: clients cut their conversations to it."""

    async def scenario():
        for engine, longest in ((FakeEngine(cache_length=64), 64), (FakeEngine(page_rows=8, pages=5), 40)):
            async with serving(engine) as (_, client):
                (card,) = [model async for model in client.models.list()]
                assert card.to_dict()["max_model_len"] == longest

    asyncio.run(scenario())


def test_logprobs():
    async def scenario():
        async with serving() as (_, client):
            first, second = (
                (await chat(client, logprobs=True, top_logprobs=2, max_tokens=2)).choices[0].logprobs.content
            )
            assert (first.token, first.logprob, first.bytes) == ("b", -98 / 8, [98])
            assert [(top.token, top.logprob) for top in first.top_logprobs] == [("b", -98 / 8), ("c", -98 / 8 - 1)]
            assert second.token == "c"
            alone = (await chat(client, logprobs=True)).choices[0].logprobs.content
            assert [token.top_logprobs for token in alone] == [[]] * 3
            stream = await chat(client, logprobs=True, stream=True)
            tokens = [token.token async for chunk in stream for token in chunk.choices[0].logprobs.content]
            assert tokens == ["b", "c", "d"]

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["fake", "org/model@main"])
def test_the_model_that_is_served(name):
    async def scenario():
        async with serving(FakeEngine(model_name=name)) as (_, client):
            (card,) = [model async for model in client.models.list()]
            assert (card.id, card.object, card.to_dict()["max_model_len"]) == (name, "model", 256)
            assert (await client.models.retrieve(name)).id == name
            assert (await chat(client, model=name)).model == name
            answer = cast(Any, await client.post("/completions", body={"prompt": "a"}, cast_to=object))
            assert answer["model"] == name
            for asking in (client.models.retrieve("other"), chat(client, model="other")):
                with pytest.raises(NotFoundError, match="'other' is not served") as caught:
                    await asking
                assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    asyncio.run(scenario())
