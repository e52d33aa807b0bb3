"""What goes on beside requests."""

import asyncio
import threading

import grpc
from slipstream.server import watchers
from slipstream.server.config import ServerConfig
from slipstream.server.errors import UnavailableError
from slipstream.server.lifecycle import Serving
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.fakes import FakeEngine
from tests.server.calls import NOT_SERVING, SERVING, WAIT_S, ask, health, whole


def test_memory_goes_back_while_nobody_asks(monkeypatch):
    returned = threading.Event()
    monkeypatch.setattr(watchers, "MEMORY_S", 0.01)
    monkeypatch.setattr(watchers.allocator, "give_back", returned.set)

    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        async with (
            Serving(lambda: (engine, None), ServerConfig(port=0)) as serving,
            grpc.aio.insecure_channel(serving.address) as channel,
        ):
            assert await asyncio.to_thread(returned.wait, WAIT_S)
            running = ask(channel, max_tokens=5)
            await running.read()
            await asyncio.sleep(0.02)  # what was begun before the request came
            returned.clear()
            await asyncio.sleep(0.05)
            assert not returned.is_set()
            engine.pace.release(99)
            await whole(running)
            assert await asyncio.to_thread(returned.wait, WAIT_S)

    asyncio.run(scenario())


def test_ready_as_long_as_the_engine_gives_a_step(monkeypatch, caplog):
    """A probe that fails means NOT_SERVING, but answers go on; the next that works means SERVING again."""
    works, asked = threading.Event(), []

    def probe(orchestrator, timeout_s):
        asked.append(timeout_s)
        if not works.is_set():
            raise UnavailableError("no step came")

    monkeypatch.setattr(Orchestrator, "probe", probe)
    config = ServerConfig(port=0, probe_interval_s=0.01, probe_timeout_s=3)

    async def scenario():
        async with (
            Serving(lambda: (FakeEngine(), None), config) as serving,
            grpc.aio.insecure_channel(serving.address) as channel,
        ):
            while await health(channel) == SERVING:
                await asyncio.sleep(0.005)
            assert not serving.is_ready
            assert await whole(ask(channel)) == "bcd"
            works.set()
            while await health(channel) == NOT_SERVING:
                await asyncio.sleep(0.005)
            assert serving.is_ready

    with caplog.at_level("INFO"):
        asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert set(asked) == {3}
    assert caplog.text.count("NOT_SERVING: no step came") == 1
    assert caplog.text.count("SERVING: the engine answers again") == 1


def test_a_stopping_server_is_not_made_ready_again_by_a_probe(monkeypatch):
    """A probe under way when the stop comes must not hold it up either."""
    is_asked, may_answer = threading.Event(), threading.Event()

    def probe(orchestrator, timeout_s):
        is_asked.set()
        may_answer.wait(WAIT_S)

    monkeypatch.setattr(Orchestrator, "probe", probe)

    async def scenario():
        engine = FakeEngine(step_s=0.005)
        serving = Serving(lambda: (engine, None), ServerConfig(port=0, probe_interval_s=0.001))
        await serving.__aenter__()
        async with grpc.aio.insecure_channel(serving.address) as channel:
            running = ask(channel, "\x01", max_tokens=60)
            await running.read()
            assert await asyncio.to_thread(is_asked.wait, WAIT_S)
            leaving = asyncio.create_task(serving.__aexit__())
            while await health(channel) == SERVING:
                await asyncio.sleep(0.002)
            may_answer.set()
            await asyncio.sleep(0.05)
            assert await health(channel) == NOT_SERVING
            await whole(running)
            await leaving

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_real_probe_of_an_idle_and_of_a_hung_engine(caplog):
    """An idle server probes with a step of its own; a device that hangs is seen within the time-out."""

    async def scenario():
        engine = FakeEngine()
        config = ServerConfig(port=0, grace_s=0, probe_interval_s=0.01, probe_timeout_s=0.1)
        async with (
            Serving(lambda: (engine, None), config) as serving,
            grpc.aio.insecure_channel(serving.address) as channel,
        ):
            while engine.steps < 3:
                await asyncio.sleep(0.005)
            assert await health(channel) == SERVING
            engine.pace = threading.Semaphore(0)
            while await health(channel) == SERVING:
                await asyncio.sleep(0.005)
            engine.pace.release(9999)
            while await health(channel) == NOT_SERVING:
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert "within 0.1 s" in caplog.text
