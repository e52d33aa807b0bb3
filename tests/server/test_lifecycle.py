"""Start, drain, stop, in this process."""

import asyncio
import threading
import time

import grpc
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.runtime.timeline import STAGES
from slipstream.server import lifecycle
from slipstream.server.config import ServerConfig
from slipstream.server.errors import UnavailableError
from slipstream.server.lifecycle import Serving
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.fakes import FakeEngine
from tests.server.calls import NOT_SERVING, SERVING, WAIT_S, ask, code_of, health, load_after, sample, whole


async def entering(serving):
    """The server while it still loads: (task, channel)."""
    task = asyncio.create_task(serving.__aenter__())
    while serving.address.endswith(":0"):
        await asyncio.sleep(0.005)
    return task, grpc.aio.insecure_channel(serving.address)


def test_not_serving_until_warm():
    """The port answers at once; requests wait for the engine."""

    async def scenario():
        may_load = threading.Event()
        serving = Serving(load_after(may_load), ServerConfig(port=0))
        task, channel = await entering(serving)
        assert await health(channel) == NOT_SERVING
        assert await code_of(ask(channel)) is grpc.StatusCode.UNAVAILABLE
        may_load.set()
        await task
        assert await health(channel) == SERVING
        assert await whole(ask(channel)) == "bcd"
        await channel.close()
        await serving.__aexit__()

    asyncio.run(scenario())


def test_a_start_tells_where_its_time_went(caplog):
    """In one line of the log, and in the metrics: the same stages."""

    async def scenario():
        async with Serving(lambda: (FakeEngine(), None), ServerConfig(port=0)) as serving:
            return [sample(serving.metrics, "slipstream_startup_seconds", stage=stage) for stage in STAGES]

    with caplog.at_level("INFO", "slipstream"):
        told = asyncio.run(scenario())
    (line,) = (record for record in caplog.records if "ready after" in record.getMessage())
    assert [line.fields[f"{stage}_s"] for stage in STAGES] == pytest.approx(told, abs=1e-3)
    assert f"ready after {sum(told):.1f} s: compiled" in line.getMessage()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_orchestrator_is_told_whether_to_keep_prefixes(prefix_cache, monkeypatch):
    told = []

    def made(*arguments, **settings):
        told.append(settings["prefix_cache"])
        return Orchestrator(*arguments, **settings)

    monkeypatch.setattr(lifecycle, "Orchestrator", made)

    async def scenario():
        async with Serving(lambda: (FakeEngine(), None), ServerConfig(port=0, prefix_cache=prefix_cache)):
            pass

    asyncio.run(scenario())
    assert told == [prefix_cache]


def test_draining_finishes_what_runs_and_refuses_what_is_new():
    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        serving = Serving(lambda: (engine, None), ServerConfig(port=0, grace_s=WAIT_S))
        await serving.__aenter__()
        async with grpc.aio.insecure_channel(serving.address) as channel:
            running = ask(channel, max_tokens=5)
            await running.read()
            leaving = asyncio.create_task(serving.__aexit__())
            while await health(channel) == SERVING:
                await asyncio.sleep(0.005)
            assert await code_of(ask(channel)) is grpc.StatusCode.UNAVAILABLE
            engine.pace.release(99)
            assert await whole(running) == "cdef"
            await leaving

    asyncio.run(scenario())


@pytest.mark.parametrize("force", [False, True])
def test_the_grace_has_an_end(force, caplog):
    """At its end, or when somebody forces, what still runs is cancelled and counted."""

    async def scenario():
        engine = FakeEngine(step_s=0.005)
        serving = Serving(lambda: (engine, None), ServerConfig(port=0, grace_s=WAIT_S if force else 0.05))
        await serving.__aenter__()
        async with grpc.aio.insecure_channel(serving.address) as channel:
            running = ask(channel, "\x01", max_tokens=120)
            await running.read()
            if force:
                serving.force_requested.set()
            await serving.__aexit__()
            assert await code_of(running) is grpc.StatusCode.UNAVAILABLE

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert "cancelling 1 requests that are not finished" in caplog.text


def test_a_load_that_is_refused_closes_the_port():
    def refuse():
        raise RefusedError("no such model")

    async def scenario():
        serving = Serving(refuse, ServerConfig(port=0))
        with pytest.raises(RefusedError, match="no such model"):
            await serving.__aenter__()
        async with grpc.aio.insecure_channel(serving.address) as channel:
            assert await code_of(ask(channel)) is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_a_warm_up_that_fails_is_told(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(engine, "warm_up", lambda params, state: 1 / 0)

    async def scenario():
        with pytest.raises(UnavailableError, match="ZeroDivisionError"):
            await Serving(lambda: (engine, None), ServerConfig(port=0)).__aenter__()

    asyncio.run(scenario())


@pytest.mark.parametrize("failing", ["warm-up", "metrics", "a cancelled start"])
def test_a_start_that_fails_leaves_no_thread(failing, monkeypatch):
    """Whatever has been started by then: the engine's loop would hold the device, and the process its memory."""
    engine, is_warming_up, before = FakeEngine(), threading.Event(), set(threading.enumerate())
    if failing == "warm-up":
        monkeypatch.setattr(engine, "warm_up", lambda params, state: 1 / 0)
    elif failing == "metrics":
        monkeypatch.setattr(lifecycle.Metrics, "watch_devices", lambda *args: 1 / 0)
    else:
        monkeypatch.setattr(engine, "warm_up", lambda params, state: is_warming_up.set() or time.sleep(0.05) or state)

    async def scenario():
        start = asyncio.create_task(Serving(lambda: (engine, None), ServerConfig(port=0)).__aenter__())
        if failing == "a cancelled start":
            await asyncio.to_thread(is_warming_up.wait, WAIT_S)
            start.cancel()
        with pytest.raises((UnavailableError, ZeroDivisionError, asyncio.CancelledError)):
            await start
        left = {thread.name for thread in set(threading.enumerate()) - before}
        assert not left & {"orchestrator", "delivery"}

    asyncio.run(scenario())


def test_a_dead_engine_asks_for_the_stop():
    def broken(step):
        raise RuntimeError("no device")

    async def scenario():
        async with Serving(lambda: (FakeEngine(on_generate=broken), None), ServerConfig(port=0)) as serving:
            async with grpc.aio.insecure_channel(serving.address) as channel:
                for _ in range(3):
                    assert await code_of(ask(channel)) is grpc.StatusCode.INTERNAL
                await asyncio.wait_for(serving.stop_requested.wait(), WAIT_S)
            assert serving.dead_reason is not None
            assert "no device" in serving.dead_reason

    asyncio.run(scenario())
