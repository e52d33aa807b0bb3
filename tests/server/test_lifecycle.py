"""Start, drain, stop: in this process, and with real signals in another."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.runtime.timeline import STAGES
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server import doors, lifecycle, watchers
from slipstream.server.config import ServerConfig
from slipstream.server.errors import UnavailableError
from slipstream.server.lifecycle import Serving
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.fakes import FakeEngine
from tests.server.calls import EOF, WAIT_S, LoadedServing, health, load_after, sample

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def ask(channel, text="a", max_tokens=3):
    request = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text=text), max_tokens=max_tokens)
    return OrchestratorStub(channel).Decode(request, timeout=WAIT_S)


async def whole(call):
    text = ""
    while (reply := await call.read()) is not EOF:
        text += reply.stream_content.samples[0].text
    return text


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await whole(call)
    return caught.value.code()


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


def test_a_port_in_use_is_refused_before_the_load():
    async def scenario():
        async with Serving(lambda: (FakeEngine(), None), ServerConfig(port=0)) as first:
            port = int(first.address.rsplit(":", 1)[1])
            with pytest.raises(RefusedError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
                await Serving(lambda: pytest.fail("loaded"), ServerConfig(port=port)).__aenter__()

    asyncio.run(scenario())


def test_a_host_that_is_not_here_is_refused():
    async def scenario():
        with pytest.raises(RefusedError, match=r"cannot listen on 192\.0\.2\.1:0"):
            await Serving(lambda: pytest.fail("loaded"), ServerConfig(host="192.0.2.1", port=0)).__aenter__()

    asyncio.run(scenario())


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


async def forward(reader, writer, is_cut):
    """Bytes, until the line is cut: then they go nowhere, and nobody is told."""
    while data := await reader.read(65536):
        if not is_cut.is_set():
            writer.write(data)
    writer.close()


def test_a_peer_that_vanishes_without_a_word_gives_its_slot_back(monkeypatch):
    monkeypatch.setattr(doors, "KEEPALIVE_S", 0.4)

    async def scenario():
        is_cut, engine = asyncio.Event(), FakeEngine(step_s=0.02, cache_length=10_000)
        config = ServerConfig(port=0, grace_s=0, probe_interval_s=0)
        async with LoadedServing(lambda: (engine, None), config) as serving:

            async def through(reader, writer):
                to_server = await asyncio.open_connection(*serving.address.split(":"))
                await asyncio.gather(forward(reader, to_server[1], is_cut), forward(to_server[0], writer, is_cut))

            proxy = await asyncio.start_server(through, "127.0.0.1", 0)
            port = proxy.sockets[0].getsockname()[1]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                endless = pb.DecodeRequest.TextContent(text="a")
                request = pb.DecodeRequest(text_content=endless, max_tokens=5000, ignore_eos=True)
                call = OrchestratorStub(channel).Decode(request)
                await call.read()
                is_cut.set()
                while serving.orchestrator.slots_in_use:
                    await asyncio.sleep(0.02)
            proxy.close()

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


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


SERVER = """
import asyncio, sys, threading
from slipstream.server.config import ServerConfig
from slipstream.server.serve import serve
from tests.fakes import FakeEngine
engine = FakeEngine(step_s=0.02)
if sys.argv[1] == "broken":
    engine.on_generate = lambda step: 1 / 0
def load():
    if sys.argv[1] == "never":
        print("loading", flush=True)
        threading.Event().wait()
    return engine, None
sys.exit(asyncio.run(serve(load, ServerConfig(port=0, grace_s=30))))
"""


def address_of(process: subprocess.Popen[str]) -> str:
    """host:port, when it serves."""
    assert process.stdout is not None
    return process.stdout.readline().removeprefix("SERVING on ").strip()


def errors_of(process: subprocess.Popen[str]) -> str:
    """All that it wrote to stderr."""
    assert process.stderr is not None
    return process.stderr.read()


def start(mode):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", SERVER, mode]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(number):
    with start("serve") as process:
        address = address_of(process)
        with grpc.insecure_channel(address) as channel:
            request = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[64]), max_tokens=10)
            call = OrchestratorStub(channel).Decode(request, timeout=WAIT_S)
            text = next(call).stream_content.samples[0].text
            process.send_signal(number)
            text += "".join(reply.stream_content.samples[0].text for reply in call)
        assert text == "ABCDEFGHIJ"
        assert process.wait(WAIT_S) == 0
        assert errors_of(process) == ""


def test_a_second_signal_forces():
    with start("serve") as process:
        address = address_of(process)
        with grpc.insecure_channel(address) as channel:
            request = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[130]), max_tokens=250)
            call = OrchestratorStub(channel).Decode(request, timeout=WAIT_S)
            next(call)
            process.send_signal(signal.SIGTERM)
            next(call)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait(WAIT_S) == 0


def test_a_dead_engine_ends_the_process_with_the_reason():
    with start("broken") as process:
        address = address_of(process)
        request = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[64]), max_tokens=10)
        with grpc.insecure_channel(address) as channel:
            for _ in range(3):
                with pytest.raises(grpc.RpcError):
                    list(OrchestratorStub(channel).Decode(request, timeout=WAIT_S))
        assert process.wait(WAIT_S) == 1
        assert "the engine is given up: DeadError: 3 failures in a row" in errors_of(process)


def test_a_signal_during_the_load_ends_it():
    with start("never") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.terminate()
        assert process.wait(WAIT_S) == 0
