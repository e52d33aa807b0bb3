"""A full queue, as its callers meet it."""

import asyncio
import json
import threading

import grpc
import pytest
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, answer, failure, outcomes, refusal, serving, text_request, until


def test_a_full_queue_answers_resource_exhausted():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a", 9), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            code, details = await refusal(channel, text_request("a"))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1 requests wait already and max_queued=1" in details
            engine.pace.release(99)
            assert (await second)[0] == "BCD"

    asyncio.run(scenario())


def test_a_full_queue_hints_when_to_come_again():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a", 9), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            error = await failure(channel, text_request("a"))
            trailers = dict(error.trailing_metadata())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 50 <= int(trailers["retry-after-ms"]) <= 30_000
            engine.pace.release(99)
            await second

    asyncio.run(scenario())


def test_a_full_queue_refuses_before_the_text_is_tokenised():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a", 9), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            engine.get_tokenizer = lambda: pytest.fail("tokenised")
            assert (await refusal(channel, text_request("a")))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            engine.pace.release(99)
            await second
            assert outcomes(server) == {"ok": 2.0, "rejected": 1.0}
            del engine.get_tokenizer

    asyncio.run(scenario())


def test_a_client_with_a_retry_policy_is_pushed_back_and_then_answered():
    """The client's own gRPC reads grpc-retry-pushback-ms: its caller never sees the refusal."""
    policy = {
        "maxAttempts": 5, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }  # fmt: skip
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})

    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a", 9), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            async with grpc.aio.insecure_channel(server.address, [("grpc.service_config", config)]) as patient:
                third = asyncio.create_task(answer(patient, text_request("B")))
                refused = server.metrics.registry.get_sample_value
                await until(lambda: refused("slipstream_requests_total", {"outcome": "rejected"}))
                engine.pace.release(99)
                assert (await second)[0] == "BCD"
                assert (await third)[0] == "CDE"

    asyncio.run(scenario())
