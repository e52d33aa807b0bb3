"""Calls over real gRPC to a real server in this process, with a fake engine."""

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import ServerConfig
from slipstream.server.grpc.messages import read_reply
from slipstream.server.lifecycle import Load, Serving
from slipstream.server.observe.endpoint import Endpoint
from slipstream.server.observe.metrics import Metrics
from slipstream.server.observe.profile import Profile
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.fakes import FakeEngine

WAIT_S = 10
EOF = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]  # the stubs leave it out
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class LoadedServing(Serving):
    """Between its first request and its end the engine is there, and what the config asks for beside it."""

    orchestrator: Orchestrator[Any, Any, Any]
    http_address: str
    endpoint: Endpoint
    profile: Profile


def load_after(may_load: threading.Event) -> Load:
    """A load that waits for the event."""

    def load() -> tuple[FakeEngine, None]:
        assert may_load.wait(WAIT_S)
        return FakeEngine(), None

    return load


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
    return error.code(), details_of(error)


def details_of(error: grpc.aio.AioRpcError) -> str:
    """Its message."""
    details = error.details()
    assert details is not None
    return details


async def health(channel, service=""):
    """The status that grpc.health.v1 tells of a service; "" is the server."""
    stub = cast(Any, health_pb2_grpc.HealthStub(channel))  # its stubs name no method
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)).status


async def events(channel, request, **more):
    """What our own client would read."""
    replies = OrchestratorStub(channel).Decode(request, timeout=WAIT_S, **more)
    return [event async for reply in replies for event in read_reply(reply)]


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """A metric's value; it must be there."""
    value = metrics.registry.get_sample_value(name, labels)
    assert value is not None, f"no {name} with {labels}"
    return value


def outcomes(server):
    """How often each."""
    value = server.metrics.registry.get_sample_value
    names = ("ok", "cancelled", "deadline", "rejected", "failed")
    return {name: count for name in names if (count := value("slipstream_requests_total", {"outcome": name}))}


def ask(channel, text="a", max_tokens=3):
    """A Decode under way."""
    request = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text=text), max_tokens=max_tokens)
    return OrchestratorStub(channel).Decode(request, timeout=WAIT_S)


async def whole(call):
    """All its text."""
    text = ""
    while (reply := await call.read()) is not EOF:
        text += reply.stream_content.samples[0].text
    return text


async def code_of(call):
    """That it fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await whole(call)
    return caught.value.code()
