"""A server whose engine hangs, or shares it with other hosts, and a follower's process."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server import following, lifecycle
from slipstream.server.config import ServerConfig, WatchConfig
from slipstream.server.lifecycle import Serving

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, load_after
from tests.server.observe.test_endpoint import get
from tests.server.test_lifecycle import ask, code_of, whole


class FakePeers:
    """Other hosts that are lost, or leave, when a test says so."""

    def __init__(self) -> None:
        self.stops = 0

    def watch(self, on_lost, on_leaving) -> None:
        self.lose, self.leave = on_lost, on_leaving

    def stop(self) -> None:
        self.stops += 1


def test_a_lost_host_fails_what_runs_at_once_though_the_device_hangs():
    peers = FakePeers()

    async def scenario():
        serving = Serving(lambda: (FakeEngine(pace=threading.Semaphore(0)), None), ServerConfig(port=0), None, peers)
        await serving.__aenter__()
        async with grpc.aio.insecure_channel(serving.address) as channel:
            running = ask(channel)
            await running.read()
            waiting = [ask(channel) for _ in range(3)]
            while serving.orchestrator is None or serving.orchestrator.queue_depth < 3:
                await asyncio.sleep(0.005)
            peers.lose("host 1: it died")
            for call in (running, *waiting):
                assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(serving.stop_requested.wait(), WAIT_S)
        await serving.__aexit__()
        assert serving.dead_reason == "the engine is given up: host 1: it died"
        assert serving.hangs

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert peers.stops == 0, "there is nobody to stop in order"


def test_a_host_that_is_lost_before_the_group_is_ready_ends_the_process(monkeypatch):
    peers, statuses, may_load = FakePeers(), [], threading.Event()
    monkeypatch.setattr(lifecycle, "leave_at_once", statuses.append)

    async def scenario():
        serving = Serving(load_after(may_load), ServerConfig(port=0), None, peers)
        task = asyncio.create_task(serving.__aenter__())
        while not hasattr(peers, "lose"):
            await asyncio.sleep(0.005)
        peers.lose("host 1: it died")
        while not statuses:
            await asyncio.sleep(0.005)
        may_load.set()
        await task
        await serving.__aexit__()

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert statuses == [1]


def test_a_host_that_is_leaving_has_the_leader_drain_and_stop_the_group():
    peers = FakePeers()

    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        async with Serving(lambda: (engine, None), ServerConfig(port=0, grace_s=WAIT_S), None, peers) as serving:
            channel = grpc.aio.insecure_channel(serving.address)
            running = ask(channel, max_tokens=5)
            await running.read()
            peers.leave("host 1 was asked to stop")
            await serving.stop_requested.wait()
            engine.pace.release(99)
            assert await whole(running) == "cdef"
            await channel.close()
        assert not serving.hangs

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert peers.stops == 1


def test_a_host_that_is_lost_during_a_drain_fails_what_runs_and_the_rest_of_the_end_goes_on():
    peers = FakePeers()

    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        serving = Serving(lambda: (engine, None), ServerConfig(port=0, grace_s=WAIT_S), None, peers)
        await serving.__aenter__()
        async with grpc.aio.insecure_channel(serving.address) as channel:
            running = ask(channel)
            await running.read()
            leaving = asyncio.create_task(serving.__aexit__())
            while serving.is_ready:
                await asyncio.sleep(0.005)
            peers.lose("host 1: it died")
            assert await code_of(running) is grpc.StatusCode.UNAVAILABLE
            await leaving
        assert serving.dead_reason == "the engine is given up: host 1: it died"
        assert serving.hangs

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert peers.stops == 0


SERVER = """
import asyncio, sys, threading
from slipstream.server.config import ServerConfig
from slipstream.server.serve import serve
from tests.fakes import FakeEngine
engine = FakeEngine(on_generate=lambda step: threading.Event().wait())
sys.exit(asyncio.run(serve(lambda: (engine, None), ServerConfig(port=0, step_timeout_s=0.3, probe_interval_s=0))))
"""


@pytest.mark.slow
def test_a_device_that_hangs_ends_the_process_after_the_timeout():
    """With its requests first: Python's own end would wait for the device."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", SERVER]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().removeprefix("SERVING on ").strip()
        request = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[64]), max_tokens=10)
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(OrchestratorStub(channel).Decode(request, timeout=WAIT_S))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "a step has taken longer than --step-timeout=0.3 s" in str(caught.value.details())
        assert process.wait(WAIT_S) == 1
        assert "the engine is given up: a step has taken longer" in process.stderr.read()


class FakeGroup:
    """A follower's group, which ends as a test says."""

    def __init__(self, *end, follows: bool = True) -> None:
        self.end, self.is_ready, self.left, self._follows = end, False, 0, follows
        self.during: Callable[[], object] = lambda: None

    def run(self):
        self.during()
        return self.end

    def leave(self) -> bool:
        self.left += 1
        return self._follows


@pytest.fixture(autouse=True)
def own_signals():
    """As they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def statuses(monkeypatch):
    """With which the process would have ended."""
    found = []
    monkeypatch.setattr(following, "leave_at_once", found.append)
    return found


def test_a_follower_tells_whether_it_is_ready_and_ends_with_the_group(statuses, monkeypatch):
    group, told = FakeGroup(0, "the leader has stopped the group"), []
    made = following.Endpoint

    def endpoint(*arguments):
        server = made(*arguments)

        def look():
            for group.is_ready in (False, True):
                told.append([get(server.address, path)[0] for path in ("/readyz", "/healthz")])

        group.during = look
        return server

    monkeypatch.setattr(following, "Endpoint", endpoint)
    assert following.follow(group, ServerConfig(watch=WatchConfig(metrics_port=0))) == 0
    assert told == [[503, 200], [200, 200]]
    assert statuses == []


def test_a_follower_that_does_not_fit_is_refused():
    with pytest.raises(RefusedError, match="--slots: '2' here, '4' on the leader"):
        following.follow(FakeGroup(2, "--slots: '2' here, '4' on the leader"), ServerConfig())


def test_a_follower_whose_group_failed_ends_at_once(statuses):
    following.follow(FakeGroup(1, "the leader is gone"), ServerConfig())
    assert statuses == [1]


@pytest.mark.parametrize(
    ("signals", "follows", "left", "ends"), [(1, True, 1, []), (2, True, 1, [1]), (1, False, 1, [0])]
)
def test_a_signal_asks_the_leader_and_a_second_one_does_not_wait(signals, follows, left, ends, statuses):
    group = FakeGroup(0, "the leader has stopped the group", follows=follows)
    group.during = lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(signals)]
    following.follow(group, ServerConfig())
    assert (group.left, statuses) == (left, ends)
