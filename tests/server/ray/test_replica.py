"""A replica as Serve treats it: made, asked whether it is well and how busy, and closed."""

import asyncio
import gc
import threading
from contextlib import asynccontextmanager

import pytest
from slipstream.server.errors import UnavailableError

from tests.server.calls import until


@pytest.fixture
def replicas(handles, fake_engine, monkeypatch):
    """Makes one over `fake_engine`, of flags; leaving closes it as Serve does."""
    from slipstream.server.ray.replica import EngineReplica
    from slipstream.server.ray.settings import configs

    monkeypatch.setattr("slipstream.server.observe.logs.configure", lambda form, prompts: None)

    @asynccontextmanager
    async def made(**args):
        replica = EngineReplica.__new__(EngineReplica)
        await replica.__init__(*configs({"grace": 5, "probe-interval": 0, **args}))
        try:
            yield replica
        finally:
            closing = replica.__del__()
            if closing is not None:
                await closing
            gc.unfreeze()

    return made


def test_it_is_warm_when_it_is_made_and_answers(replicas, handles, fake_engine):
    async def run():
        async with replicas() as replica:
            assert "warm_up" in fake_engine.log
            ingress = handles.ingress_of(handles.Handle(replica))
            body = b'{"prompt": "a", "max_tokens": 3}'
            headers = {"content-type": "application/json"}
            status, _, answer = await handles.ask(ingress, "POST", "/v1/completions", body, headers)
            assert status == 200
            assert b'"bcd"' in b"".join(answer)

    asyncio.run(run())


def test_health_is_a_real_step(replicas, fake_engine):
    async def run():
        async with replicas(**{"probe-timeout": 0.2}) as replica:
            steps = fake_engine.steps
            await replica.check_health()
            assert fake_engine.steps > steps
            fake_engine.pace = threading.Semaphore(0)  # the device hangs
            with pytest.raises(UnavailableError, match=r"no step .* within 0\.2 s"):
                await replica.check_health()
            fake_engine.pace.release(1000)
            await replica.check_health()

    asyncio.run(run())


def test_an_engine_that_was_given_up_is_not_well(replicas, fake_engine):
    async def run():
        async with replicas() as replica:

            def fails(step):
                raise RuntimeError("the device is gone")

            fake_engine.on_generate = fails
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    await replica.check_health()
            with pytest.raises(UnavailableError, match="given up"):
                await replica.check_health()
            assert await replica.record_autoscaling_stats() == {"queued": 0, "running": 0}

    asyncio.run(run())


def test_its_load_is_what_waits_and_what_runs(replicas, handles, fake_engine):
    async def run():
        fake_engine.step_s = 0.005
        async with replicas() as replica:
            assert await replica.record_autoscaling_stats() == {"queued": 0, "running": 0}
            ingress = handles.ingress_of(handles.Handle(replica))
            body = b'{"prompt": "\\u0001", "max_tokens": 40, "n": 2}'  # both slots
            headers = {"content-type": "application/json"}
            calls = [asyncio.create_task(handles.ask(ingress, "POST", "/v1/completions", body, headers))]
            await until(lambda: replica._fronts.orchestrator.in_work)
            calls += [asyncio.create_task(handles.ask(ingress, "POST", "/v1/completions", body, headers))]
            await until(lambda: replica._fronts.orchestrator.queue_depth)
            assert await replica.record_autoscaling_stats() == {"queued": 1, "running": 1}
            await asyncio.gather(*calls)

    asyncio.run(run())


def test_closed_it_has_drained_and_left_nothing(replicas, handles, fake_engine, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def run():
        fake_engine.step_s = 0.01
        async with replicas() as replica:
            assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o700]
            ingress = handles.ingress_of(handles.Handle(replica))
            body, headers = b'{"prompt": "a", "max_tokens": 20}', {"content-type": "application/json"}
            call = asyncio.create_task(handles.ask(ingress, "POST", "/v1/completions", body, headers))
            await until(lambda: replica._fronts.orchestrator.in_work)
        assert (await call)[0] == 200
        assert list(tmp_path.iterdir()) == []
        assert replica.__del__() is None

    asyncio.run(run())


def test_a_front_that_is_gone_is_told_as_unavailable(replicas, handles, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def run():
        async with replicas() as replica:
            (socket,) = tmp_path.glob("*/http")
            socket.unlink()
            ingress = handles.ingress_of(handles.Handle(replica))
            status, _, body = await handles.ask(ingress, "GET", "/v1/models")
            assert status == 503
            assert b"the replica is stopping" in b"".join(body)

    asyncio.run(run())
