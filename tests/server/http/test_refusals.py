"""What is not answered, and how OpenAI's clients read it."""

import asyncio
import json
import math
import threading
from typing import Any

import aiohttp
import pytest
from openai import APIError, BadRequestError, InternalServerError, NotFoundError, RateLimitError
from slipstream.server.config import SecurityConfig, ServerConfig
from slipstream.server.http import incoming
from slipstream.server.http.completions import CompletionReply
from slipstream.server.lifecycle import Serving

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, load_after, until
from tests.server.http.serving import client_of, serving, url

A: dict[str, Any] = {"prompt": "a", "max_tokens": 3}
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
JSON = {"content-type": "application/json"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def messages(*turns):
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", b"{", None, "the body cannot be read: Invalid JSON"),
        ("completions", b'{"prompt": "\xff"}', None, "the body cannot be read"),
        ("completions", rb'{"prompt": "\ud800"}', None, "the body cannot be read"),
        ("completions", b"[]", None, "the body=[]: Input should be an object"),
        ("completions", {}, "prompt", "prompt is missing"),
        ("completions", {"prompt": None}, "prompt", "prompt is missing"),
        ("completions", {"prompt": {}}, "prompt", "must be a string, a list of strings, a list of token ids, or"),
        ("completions", {"prompt": []}, "prompt", "prompt is an empty list"),
        ("completions", {"prompt": ""}, None, "the prompt is empty"),
        ("completions", {"prompt": [[]]}, None, "the prompt is empty"),
        ("completions", {"prompt": ["a", 1]}, "prompt[1]", "prompt[1]=1: Input should be a valid string"),
        ("completions", {"prompt": [1, "a"]}, "prompt[1]", "prompt[1]='a': Input should be a valid integer"),
        ("completions", {"prompt": [[1], [True]]}, "prompt[1][0]", "prompt[1][0]=True"),
        ("completions", {"prompt": [65, 256]}, None, "token id 256 at position 1 is outside the vocabulary"),
        ("completions", {"prompt": [10**30]}, None, "is outside the vocabulary"),
        ("completions", A | {"max_tokens": 0}, "max_tokens", "max_tokens=0 must be at least 1"),
        ("completions", A | {"max_tokens": "3"}, "max_tokens", "max_tokens='3': Input should be a valid integer"),
        ("completions", A | {"max_tokens": 3.5}, "max_tokens", "max_tokens=3.5"),
        ("completions", A | {"temperature": -1}, "temperature", "temperature=-1.0 must be 0 (greedy)"),
        ("completions", A | {"temperature": math.nan}, "temperature", "temperature=nan"),
        ("completions", A | {"temperature": "hot"}, "temperature", "temperature='hot'"),
        ("completions", A | {"top_p": -0.5}, "top_p", "top_p=-0.5 must be from 0 (keep the likeliest alone) to 1"),
        ("completions", A | {"top_k": -2}, "top_k", "top_k=-2"),
        ("completions", A | {"seed": 0.5}, "seed", "seed=0.5: Input should be a valid integer"),
        ("completions", A | {"presence_penalty": 3}, "presence_penalty", "must be from -2 to 2"),
        ("completions", A | {"n": 3}, "n", "num_samples=3 needs as many slots and the server has 2"),
        ("completions", A | {"n": 0}, "n", "must be at least 1"),
        ("completions", A | {"logprobs": 21}, "logprobs", "logprobs=21"),
        ("completions", A | {"logprobs": True}, "logprobs", "logprobs=True: Input should be a valid integer"),
        ("completions", A | {"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs=21 must be from 0"),
        ("completions", A | {"stop": [""]}, None, "a stop string of 0 characters"),
        ("completions", A | {"stop": 3}, "stop", "must be a string, or a list of strings"),
        ("completions", A | {"stop_token_ids": [2**31]}, None, "stop token id 2147483648 must be from 0"),
        ("completions", A | {"priority": 11}, "priority", "priority=11"),
        ("completions", A | {"stream": "yes"}, "stream", "stream='yes'"),
        ("completions", A | {"stream_options": {}}, "stream_options", "set stream=true"),
        ("completions", A | {"echo": 1}, "echo", "echo=1: Input should be a valid boolean"),
        ("completions", A | {"echo": True, "max_tokens": -1}, "max_tokens", "max_tokens=-1 must be at least 1"),
        ("completions", A | {"suffix": "."}, "suffix", "suffix='.' is not supported"),
        ("completions", A | {"best_of": 2}, "best_of", "best_of=2 must be n=1"),
        ("completions", A | {"logit_bias": {"x": 1}}, "logit_bias", "'x' must be a token id, such as"),
        (
            "completions",
            A | {"logit_bias": {"5": "1"}},
            "logit_bias.5",
            "logit_bias.5='1': Input should be",
        ),
        ("completions", A | {"logit_bias": [5]}, "logit_bias", "logit_bias=[5]"),
        ("completions", A | {"logit_bias": {"5": 101}}, "logit_bias", "logit_bias[5]=101.0 must be from -100 to 100"),
        ("completions", A | {"logit_bias": {"-1": 1}}, "logit_bias", "token id -1 must be from 0"),
        ("completions", A | {"logit_bias": {"256": 1}}, "logit_bias", "token id 256 is outside the vocabulary"),
        ("completions", A | {"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias", "301 token ids are too many"),
        ("completions", A | {"cache_salt": ""}, "cache_salt", "0 characters, must be a text of 1 to 256 characters"),
        ("completions", A | {"cache_salt": "s" * 257}, "cache_salt", "257 characters, must be a text"),
        ("chat/completions", HI | {"cache_salt": 5}, "cache_salt", "cache_salt=5: Input should be a valid string"),
        ("completions", A | {"prediction": {"type": "content", "content": "x"}}, "prediction", "does not speculate"),
        ("completions", A | {"prediction": {"type": "draft", "content": "x"}}, "prediction.type", "must be 'content'"),
        ("completions", A | {"prediction": {"type": "content"}}, "prediction.content", "is missing"),
        (
            "chat/completions",
            HI | {"prediction": {"type": "content", "content": [IMAGE]}},
            "prediction.content[0]",
            "'image_url' is not supported",
        ),
        ("completions", A | {"min_tokens": 4}, "min_tokens", "min_tokens=4 must be at most max_tokens=3"),
        ("completions", A | {"min_tokens": -1}, "min_tokens", "min_tokens=-1 must be from 0"),
        ("chat/completions", HI | {"min_tokens": 4}, "min_tokens", "min_tokens=4 must be at most max_tokens=3"),
        ("completions", A | {"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "is not supported"),
        ("chat/completions", {}, "messages", "messages is missing"),
        ("chat/completions", messages(), "messages", "messages is empty"),
        ("chat/completions", messages({"role": "user"}), "messages[0].content", "messages[0].content is missing"),
        ("chat/completions", messages({"role": "bot", "content": ""}), "messages[0].role", "'bot' must be one of"),
        ("chat/completions", messages({"role": "user", "content": [IMAGE]}), "messages[0].content[0]", "'image_url'"),
        ("chat/completions", HI | {"tools": [{}]}, "tools[0].type", "tools[0].type is missing"),
        ("chat/completions", HI | {"audio": {}}, "audio", "audio={} is not supported"),
        ("chat/completions", HI | {"verbosity": "low"}, "verbosity", "verbosity='low' is not supported"),
        ("chat/completions", HI | {"include_reasoning": False}, "include_reasoning", "is not supported"),
        ("chat/completions", HI | {"thinking_token_budget": 9}, "thinking_token_budget", "is not supported"),
        ("chat/completions", HI | {"add_special_tokens": True}, "add_special_tokens", "is not supported"),
        ("chat/completions", HI | {"echo": True}, "echo", "echo=True is not supported"),
        (
            "chat/completions",
            HI | {"reasoning_effort": "most"},
            "reasoning_effort",
            "='most': Input should be",
        ),
        ("completions", A | {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "is not supported"),
        ("completions", A | {"prompt_embeds": "x"}, "prompt_embeds", "is not supported"),
        ("responses", {"input": "a", "reasoning": {"effort": "most"}}, "reasoning.effort", "'most': Input should be"),
        ("responses", {"input": "a", "reasoning": {"summary": "auto"}}, "reasoning.summary", "'auto': Input should"),
        ("chat/completions", HI | {"top_logprobs": 2}, "top_logprobs", "are for logprobs=true"),
        ("chat/completions", HI | {"logprobs": 2}, "logprobs", "logprobs=2: Input should be a valid boolean"),
        ("chat/completions", HI | {"max_completion_tokens": 0}, "max_tokens", "max_tokens=0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_bodies_are_refused_and_the_server_goes_on(path, body, param, message):
    async def scenario():
        async with serving() as (server, client), aiohttp.ClientSession(headers=JSON) as session:
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            async with session.post(url(server, f"/v1/{path}"), data=sent) as answer:
                assert answer.status == 400
                error = (await answer.json())["error"]
                assert message in error["message"]
                assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, None)
            assert (await client.completions.create(model="fake", **A)).choices[0].text == "bcd"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a" * 17}, "the prompt has 17 tokens, at most 16 are taken"),
        (A | {"max_tokens": 256}, "ask for at most 255 tokens"),
    ],
)
def test_what_exceeds_the_context_has_openais_code(body, message):
    async def scenario():
        async with serving() as (_, client):
            with pytest.raises(BadRequestError, match=message) as refused:
                await client.completions.create(model="fake", **body)
            assert refused.value.code == "context_length_exceeded"

    asyncio.run(scenario())


def test_what_asks_for_nothing_is_no_refusal():
    async def scenario():
        async with serving() as (_, client):
            neutral = {"echo": False, "suffix": None, "best_of": 1, "logprobs": None, "bad_words": []}
            assert await client.completions.create(model="fake", **A, extra_body=neutral)
            neutral = {"tools": [], "response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"]}
            assert await client.chat.completions.create(model="fake", **HI, extra_body=neutral)

    asyncio.run(scenario())


def test_openais_exceptions():
    async def scenario():
        engine = FakeEngine(late_errors={0: RuntimeError("boom")})
        async with serving(engine) as (_, client):
            with pytest.raises(InternalServerError, match="failed in the engine: RuntimeError: boom") as failed:
                await client.completions.create(model="fake", **A)
            assert (failed.value.status_code, failed.value.code) == (500, "engine_failed")
            with pytest.raises(BadRequestError, match=r"temperature=-1\.0") as bad:
                await client.chat.completions.create(model="fake", **HI, temperature=-1)
            assert bad.value.param == "temperature"
            with pytest.raises(NotFoundError, match="there is no /v1/embeddings"):
                await client.embeddings.create(model="fake", input="a")
            assert (await client.completions.create(model="fake", **A)).choices[0].text == "bcd"

    asyncio.run(scenario())


def test_a_failure_in_a_stream_is_its_last_event():
    """The first step works, so the stream has begun."""

    async def scenario():
        engine = FakeEngine(late_errors={1: RuntimeError("boom")}, step_s=0.02)
        async with serving(engine) as (server, client):
            stream = await client.completions.create(model="fake", prompt="a", max_tokens=9, stream=True)
            assert (await anext(stream)).choices[0].text == "b"
            with pytest.raises(APIError, match="RuntimeError: boom"):
                [chunk async for chunk in stream]
            engine.late_errors = {engine.steps + 1: RuntimeError("boom")}
            async with aiohttp.ClientSession() as session:
                body = {"prompt": "a", "max_tokens": 9, "stream": True}
                async with session.post(url(server, "/v1/completions"), json=body) as answer:
                    *_, last, end = (await answer.text()).split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
            assert end == ""

    asyncio.run(scenario())


def test_a_failure_before_the_first_token_of_a_stream_has_a_status():
    async def scenario():
        async with serving(FakeEngine(on_prefill=lambda prompt: 1 / 0)) as (_, client):
            with pytest.raises(InternalServerError, match="ZeroDivisionError"):
                await client.completions.create(model="fake", **A, stream=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_bug_of_ours_is_told_and_logged_and_the_server_goes_on(is_stream, monkeypatch, caplog):
    async def scenario():
        async with serving() as (server, client):
            with monkeypatch.context() as broken:
                broken.setattr(CompletionReply, "chunk" if is_stream else "whole", lambda *args: 1 / 0)
                with pytest.raises(InternalServerError, match="the server failed; its log tells why"):
                    await client.completions.create(model="fake", **A, stream=is_stream)
            assert (await client.completions.create(model="fake", **A)).choices[0].text == "bcd"
            assert server._gateway.calls == server.orchestrator.slots_in_use == 0

    asyncio.run(scenario())
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "failed in the HTTP front" in record.message
    assert record.exc_info[0] is ZeroDivisionError


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(incoming, "BODY_S", 0.05)

    async def scenario():
        async with serving() as (server, _):
            reader, writer = await asyncio.open_connection(*server.http_address.split(":"))
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
                b"content-type: application/json\r\ncontent-length: 99\r\n\r\n{"
            )
            assert b"408" in await reader.readline()
            writer.close()

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_paths_methods_and_sizes():
    async def scenario():
        config = {"security": SecurityConfig(max_message_bytes=1000)}
        async with serving(**config) as (server, client), aiohttp.ClientSession(headers=JSON) as session:

            async def error(method, path, **more):
                async with session.request(method, url(server, path), **more) as answer:
                    return answer, (await answer.json())["error"]["message"]

            answer, message = await error("GET", "/v1/nothing")
            assert answer.status == 404
            assert "there is no /v1/nothing; there are /, /detokenize, /health, " in message
            answer, message = await error("GET", "/v1/completions")
            assert (answer.status, answer.headers["allow"]) == (405, "OPTIONS, POST")
            answer, message = await error("POST", "/v1/completions", data=b" " * 1001)
            assert answer.status == 413
            assert "the body exceeds max_message_bytes=1000" in message
            answer, message = await error("POST", "/v1/completions", data=b"{}", headers={"content-encoding": "gzip"})
            assert answer.status == 400
            assert (await client.completions.create(model="fake", **A)).choices[0].text == "bcd"

    asyncio.run(scenario())


def test_what_is_no_http_is_no_line_in_the_log(caplog):
    async def scenario():
        async with serving() as (server, _):
            host, port = server.http_address.split(":")
            for words in (b"GET / HTTP/1.1\r\n bad\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"POST /\r\n\r\n"):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(words)
                writer.write_eof()
                assert b" 200 " not in await reader.read()
                writer.close()

    asyncio.run(scenario())
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_full_queue_tells_when_to_come_again():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, client):
            first = await client.completions.create(model="fake", prompt="a", max_tokens=9, stream=True)
            second = asyncio.create_task(client.completions.create(model="fake", **A))
            await until(lambda: server.orchestrator.queue_depth == 1)
            engine.get_tokenizer = lambda: pytest.fail("tokenised")
            with pytest.raises(RateLimitError, match="1 requests wait already and max_queued=1") as caught:
                await client.completions.create(model="fake", **A)
            del engine.get_tokenizer
            hints = caught.value.response.headers
            assert 50 <= int(hints["retry-after-ms"]) <= 30_000
            assert int(hints["retry-after"]) == math.ceil(int(hints["retry-after-ms"]) / 1000)
            assert caught.value.code == "rate_limit_exceeded"
            patient = asyncio.create_task(client.with_options(max_retries=9).completions.create(model="fake", **A))
            rejected = server.metrics.registry.get_sample_value
            await until(lambda: rejected("slipstream_requests_total", {"outcome": "rejected"}) == 2)
            engine.pace.release(99)
            assert (await second).choices[0].text == "bcd"
            assert (await patient).choices[0].text == "bcd"
            assert "".join([chunk.choices[0].text async for chunk in first]) == "bcdefghij"

    asyncio.run(scenario())


def test_a_batch_waits_as_a_whole_or_not_at_all():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=2) as (server, client):
            with pytest.raises(BadRequestError, match="4 prompts at once exceed max_queued=2 beyond 1 free"):
                await client.completions.create(model="fake", prompt=["a"] * 4)
            first = await client.completions.create(model="fake", prompt="a", max_tokens=9, stream=True)
            second = asyncio.create_task(client.completions.create(model="fake", **A))
            await until(lambda: server.orchestrator.queue_depth == 1)
            with pytest.raises(RateLimitError, match="1 requests wait already, 2 more exceed max_queued=2"):
                await client.completions.create(model="fake", prompt=["a", "b"])
            assert server.orchestrator.queue_depth == 1
            engine.pace.release(99)
            await second
            await first.close()

    asyncio.run(scenario())


def test_a_server_that_loads_is_not_available():
    async def scenario():
        may_load = threading.Event()
        server = Serving(load_after(may_load), ServerConfig(port=0, http_port=0))
        entering = asyncio.create_task(server.__aenter__())
        await until(lambda: not server.address.endswith(":0"))
        async with client_of(server) as client, aiohttp.ClientSession() as session:

            async def health():
                async with session.get(url(server, "/health")) as answer:
                    return answer.status

            assert await health() == 503
            with pytest.raises(InternalServerError, match="the model is still loading") as caught:
                await client.completions.create(model="fake", **A)
            assert caught.value.status_code == 503
            with pytest.raises(InternalServerError, match="still loading"):
                await client.models.list()
            may_load.set()
            await entering
            assert await health() == 200
            server.doors.is_ready = False
            assert await health() == 503
        await server.__aexit__()

    asyncio.run(scenario())


def test_request_ids_are_the_callers_or_ours_and_come_back_whatever_happens():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (server, client):
            mine = {"x-request-id": "mine-1"}
            answer = await client.completions.with_raw_response.create(model="fake", **A, extra_headers=mine)
            assert answer.headers["x-request-id"] == "mine-1"
            assert answer.parse().id == "cmpl-mine-1"
            stream = await client.completions.create(model="fake", **A, stream=True, extra_headers=mine)
            assert stream.response.headers["x-request-id"] == "mine-1"
            await stream.close()
            ids = {(await client.completions.create(model="fake", **A)).id for _ in range(2)}
            assert len(ids) == 2
            engine.on_prefill = lambda prompt: 1 / 0
            with pytest.raises(InternalServerError, match="request mine-1 failed in the engine") as caught:
                await client.completions.create(model="fake", **A, extra_headers=mine)
            assert caught.value.request_id == "mine-1"
            for bad in ("x" * 129, "na\u00efve"):
                named = aiohttp.ClientSession(headers={"x-request-id": bad})
                async with named as session, session.get(url(server, "/v1/models")) as refused:
                    assert refused.status == 400
                    assert refused.headers["x-request-id"] != bad

    asyncio.run(scenario())
