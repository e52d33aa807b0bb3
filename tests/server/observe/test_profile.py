"""--profile: a trace is written by the first request, and again when asked."""

import asyncio
import threading

import grpc
import jax
import jax.numpy as jnp
import pytest
from slipstream.engine_impl.runtime import tracing
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import ServerConfig, WatchConfig
from slipstream.server.lifecycle import Serving

from tests.fakes import FakeEngine
from tests.server.calls import LoadedServing, load_after

WAIT_S = 60
REQUEST = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text="a"), max_tokens=3)


async def ask(channel):
    return [reply async for reply in OrchestratorStub(channel).Decode(REQUEST, timeout=WAIT_S)]


def traces(folder):
    return sorted(folder.rglob("*.xplane.pb"))


def test_the_first_request_is_traced_and_the_stop_ends_the_trace(tmp_path):
    """The trace holds what JAX ran while the request was answered."""
    doubled = jax.jit(lambda x: x * 2)
    engine = FakeEngine(on_generate=lambda step: doubled(jnp.ones(3)).block_until_ready())
    config = ServerConfig(port=0, watch=WatchConfig(profile=tmp_path, profile_s=60))

    async def scenario():
        async with (
            Serving(lambda: (engine, None), config) as serving,
            grpc.aio.insecure_channel(serving.address) as channel,
        ):
            await channel.channel_ready()
            assert serving.profile is not None
            await ask(channel)
            while not serving.profile.is_tracing:
                await asyncio.sleep(0.01)
            await ask(channel)
            assert not traces(tmp_path)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    (trace,) = traces(tmp_path)
    assert b"PjRt" in trace.read_bytes()


def test_a_request_that_is_refused_during_the_load_is_not_traced(monkeypatch, tmp_path):
    monkeypatch.setattr(tracing, "start", lambda folder: pytest.fail("traced"))
    may_load = threading.Event()
    config = ServerConfig(port=0, watch=WatchConfig(profile=tmp_path))

    async def scenario():
        serving = Serving(load_after(may_load), config)
        entering = asyncio.create_task(serving.__aenter__())
        while serving.address.endswith(":0"):
            await asyncio.sleep(0.005)
        async with grpc.aio.insecure_channel(serving.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="still loading"):
                await ask(channel)
        may_load.set()
        await entering
        await serving.__aexit__()

    asyncio.run(scenario())


def test_a_window_ends_by_itself_and_can_be_opened_again(monkeypatch, tmp_path, caplog):
    calls = []
    monkeypatch.setattr(tracing, "start", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(tracing, "stop", lambda: calls.append("stop"))
    config = ServerConfig(port=0, watch=WatchConfig(profile=tmp_path, profile_s=0.05))

    async def scenario():
        async with (
            LoadedServing(lambda: (FakeEngine(), None), config) as serving,
            grpc.aio.insecure_channel(serving.address) as channel,
        ):
            await ask(channel)
            serving.profile.start()  # one runs already
            while len(calls) < 2:
                await asyncio.sleep(0.01)
            await ask(channel)  # no first request any more
            await asyncio.sleep(0.01)
            assert len(calls) == 2
            serving.profile.start()
            while len(calls) < 4:
                await asyncio.sleep(0.01)

    with caplog.at_level("INFO"):
        asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert calls == [("start", tmp_path), "stop"] * 2
    assert caplog.text.count("tracing for 0.05 s") == 2


@pytest.mark.parametrize("failing", ["start", "stop"])
def test_a_profiler_that_fails_harms_nobody(failing, monkeypatch, tmp_path, caplog):
    def fail(*arguments):
        raise RuntimeError("disk full")

    monkeypatch.setattr(tracing, "start", fail if failing == "start" else lambda folder: None)
    monkeypatch.setattr(tracing, "stop", fail)
    config = ServerConfig(port=0, watch=WatchConfig(profile=tmp_path, profile_s=0.01))

    async def scenario():
        async with (
            Serving(lambda: (FakeEngine(), None), config) as serving,
            grpc.aio.insecure_channel(serving.address) as channel,
        ):
            assert await ask(channel)
            while "disk full" not in caplog.text:
                await asyncio.sleep(0.005)
            assert await ask(channel)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
