"""Calls over real gRPC to a real server in this process, with a fake engine."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import ServerConfig
from slipstream.server.grpc.messages import read_reply
from slipstream.server.lifecycle import Serving
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.fakes import FakeEngine

WAIT_S = 10


class LoadedServing(Serving):
    """Between its first request and its end the engine is there."""

    orchestrator: Orchestrator[Any, Any, Any]
    http_address: str


@asynccontextmanager
async def serving(engine=None, **config):
    """(Serving, channel)"""
    engine = engine or FakeEngine()
    settings: dict[str, Any] = {"port": 0, "grace_s": 5.0, **config}
    async with (
        LoadedServing(lambda: (engine, None), ServerConfig(**settings)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield server, channel


def text_request(text, max_tokens=3, **more):
    return pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text=text), max_tokens=max_tokens, **more)


def token_request(token_ids, max_tokens=3, **more):
    return pb.DecodeRequest(
        token_content=pb.DecodeRequest.TokenContent(token_ids=token_ids), max_tokens=max_tokens, **more
    )


def chat_request(*turns, max_tokens=3):
    messages = [pb.DecodeRequest.Message(role=role, content=content) for role, content in turns]
    return pb.DecodeRequest(messages=pb.DecodeRequest.Chat(messages=messages), max_tokens=max_tokens)


async def answer(channel, request, **more):
    """(text, token ids, last reply)"""
    replies = [reply async for reply in OrchestratorStub(channel).Decode(request, timeout=WAIT_S, **more)]
    samples = [reply.stream_content.samples[0] for reply in replies]
    text = "".join(sample.text for sample in samples)
    return text, [token_id for sample in samples for token_id in sample.token_ids], replies[-1]


async def failure(channel, request, **more):
    """The error that the call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(channel, request, **more)
    return caught.value


async def refusal(channel, request):
    """(code, details)"""
    error = await failure(channel, request)
    return error.code(), error.details()


async def events(channel, request, **more):
    """What our own client would read."""
    replies = OrchestratorStub(channel).Decode(request, timeout=WAIT_S, **more)
    return [event async for reply in replies for event in read_reply(reply)]


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def outcomes(server):
    """How often each."""
    value = server.metrics.registry.get_sample_value
    names = ("ok", "cancelled", "deadline", "rejected", "failed")
    return {name: count for name in names if (count := value("slipstream_requests_total", {"outcome": name}))}
