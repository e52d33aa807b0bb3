"""Asking the engine for a sign of life."""

import threading
import time

import pytest
from slipstream.server.errors import UnavailableError

from tests.fakes import FakeEngine
from tests.server.scheduler.loop import WAIT_S, ask, raise_on, running, until


def test_a_probe_of_an_idle_engine_runs_a_step_and_of_a_busy_one_none_more():
    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine) as orchestrator:
        orchestrator.probe(WAIT_S)
        assert engine.log == ["generate"]
        ask(orchestrator, "a", 5).answer()
        until(lambda: orchestrator.slots_in_use == 0)
        engine.step_s = 0.002
        busy = ask(orchestrator, "\x01", 100)
        for _ in range(3):
            busy.next()
            orchestrator.probe(WAIT_S)
        busy.answer()
    assert engine.steps == 1 + 4 + 99


def test_a_probe_of_a_device_that_hangs_raises_in_time():
    engine = FakeEngine(pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        start = time.monotonic()
        with pytest.raises(UnavailableError, match=r"no step of the engine came to an end within 0\.1 s"):
            orchestrator.probe(0.1)
        assert time.monotonic() - start < 5
        engine.pace.release(99)
        orchestrator.probe(WAIT_S)


def test_a_probe_tells_a_step_that_fails_and_an_engine_that_is_gone():
    engine = FakeEngine(on_generate=raise_on(0))
    with running(engine) as orchestrator:
        with pytest.raises(UnavailableError, match="RuntimeError: step 0 broke"):
            orchestrator.probe(WAIT_S)
        orchestrator.probe(WAIT_S)
    with pytest.raises(UnavailableError, match="stopping"):
        orchestrator.probe(WAIT_S)
