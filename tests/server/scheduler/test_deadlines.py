"""Requests whose time is up, wherever they are."""

import threading
import time

import pytest
from slipstream.server.errors import DeadlineError
from slipstream.server.request.events import FinishReason

from tests.fakes import FakeEngine
from tests.server.scheduler.loop import ask, running, until


def test_a_deadline_that_has_passed_is_refused_at_once():
    engine = FakeEngine()
    with running(engine) as orchestrator, pytest.raises(DeadlineError, match="passed before it could be queued"):
        ask(orchestrator, "a", deadline=time.monotonic())
    assert engine.log == []


def test_a_deadline_in_the_queue_is_answered_in_time_though_the_device_stands_still():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        first = ask(orchestrator, "a", 3)
        first.next()
        deadline = time.monotonic() + 0.05
        late = ask(orchestrator, "A", 3, deadline=deadline)
        events = late.all()
        assert late.ended_at is not None
        assert deadline <= late.ended_at < deadline + 2
        assert [event.finish_reason for event in events] == [FinishReason.DEADLINE]
        assert (events[0].usage.queue_ms, events[0].usage.ttft_ms) == (None, None)
        assert orchestrator.queue_depth == 0
        engine.pace.release(99)
        first.answer()
    assert "prefill A" not in engine.log


def test_a_deadline_while_prefilling_and_while_decoding_frees_the_slot():
    engine = FakeEngine(max_concurrent_decodes=1, step_s=0.005)
    with running(engine) as orchestrator:
        decoding = ask(orchestrator, "\x01", 200, deadline=time.monotonic() + 0.1)
        text, last = decoding.answer()
        assert last.finish_reason is FinishReason.DEADLINE
        assert 0 < len(text) < 60
        until(lambda: orchestrator.slots_in_use == 0)
        engine.on_prefill = lambda prompt: time.sleep(0.1)
        prefilling = ask(orchestrator, "a", 200, deadline=time.monotonic() + 0.05)
        steps = engine.steps
        assert prefilling.answer()[1].finish_reason is FinishReason.DEADLINE
        until(lambda: orchestrator.slots_in_use == 0)
        assert engine.steps - steps <= 1


def test_a_cancel_at_the_deadline_is_the_deadlines():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 99, deadline=time.monotonic() + 0.03)
        request.next()
        orchestrator.cancel(request)
        assert request.answer()[1].finish_reason is FinishReason.DEADLINE
        engine.pace.release(99)
