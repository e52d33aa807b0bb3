"""Failures at every stage: whose request fails with them, and that the next one works."""

import queue
import threading

import pytest
from slipstream.engine_impl.errors import PieceError
from slipstream.server.errors import FailedError, UnavailableError
from slipstream.server.request.request import Request

from tests.fakes import FakeEngine, FakeTextStream, FakeTokenizer
from tests.server.scheduler.loop import WAIT_S, ask, raise_on, running, texts, until


def test_a_failed_step_fails_its_requests_and_the_next_ones_work():
    engine = FakeEngine(on_generate=raise_on(1))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 9)
        error = request.answer()[1].error
        assert isinstance(error, FailedError)
        assert str(error) == f"request {request.id} failed in the engine: RuntimeError: step 1 broke"
        assert ask(orchestrator, "a").answer()[0] == "bcd"
    assert engine.states_made == 2


def test_a_fresh_start_that_hangs_after_a_failed_step_is_noticed_too():
    engine, may_go_on, reasons = FakeEngine(on_generate=raise_on(1)), threading.Event(), queue.Queue()
    make = engine.init_decode_state

    def hang():
        may_go_on.wait(WAIT_S)
        return make()

    with running(engine, step_timeout_s=0.1, on_dead=reasons.put) as orchestrator:
        request = ask(orchestrator, "a", 1)
        assert request.answer()[0] == "b"
        engine.init_decode_state = hang
        ask(orchestrator, "a", 9)
        assert "a step has taken longer than --step-timeout=0.1 s" in reasons.get(timeout=WAIT_S)
        may_go_on.set()


def test_an_error_that_shows_when_tokens_are_read_is_a_failed_step_too():
    engine = FakeEngine(late_errors={0: RuntimeError("late")})
    with running(engine) as orchestrator:
        assert isinstance(ask(orchestrator, "a", 2).answer()[1].error, FailedError)
        assert ask(orchestrator, "a").answer()[0] == "bcd"


@pytest.mark.parametrize(("carries", "fault"), [(False, RuntimeError), (True, PieceError)])
def test_a_failed_prefill_fails_only_its_request(carries, fault):
    """So do pieces that are found wrong before the step that should carry them is started."""

    def on_prefill(prompt):
        if prompt == [ord("B")]:
            raise fault("no")

    engine = FakeEngine(on_prefill=on_prefill, carries_pieces=carries, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        good = ask(orchestrator, "a", 5)
        good.next()
        bad = ask(orchestrator, "B", 5)
        engine.pace.release(99)
        assert isinstance(bad.answer()[1].error, FailedError)
        assert good.answer()[0] == "cdef"
    assert engine.states_made == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_failed_step_fails_the_prompt_that_it_carries_and_the_next_ones_work(late):
    def on_prefill(prompt):
        if prompt == [ord("B")]:
            engine.late_errors = {engine.steps: RuntimeError("no")} if late else {}
            assert late, "no"

    engine = FakeEngine(on_prefill=on_prefill, carries_pieces=True, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        running_one = ask(orchestrator, "a", 5)
        running_one.next()
        carried = ask(orchestrator, "B", 5)
        engine.pace.release(99)
        for request in (running_one, carried):
            assert isinstance(request.answer()[1].error, FailedError)
        assert ask(orchestrator, "a").answer()[0] == "bcd"
    assert engine.states_made == 2


@pytest.mark.parametrize(
    "faults",
    [
        {"on_generate": raise_on(*range(9))},
        {"late_errors": {step: RuntimeError("late") for step in range(9)}},
        {"on_prefill": lambda prompt: 1 / 0},
    ],
    ids=["step", "late", "prefill"],
)
def test_an_engine_that_keeps_failing_is_given_up(faults):
    dead = queue.Queue()
    with running(FakeEngine(**faults), on_dead=dead.put) as orchestrator:
        for _ in range(3):
            assert isinstance(ask(orchestrator, "a").answer()[1].error, FailedError)
        assert "3 failures in a row" in dead.get(timeout=WAIT_S)
        orchestrator._thread.join(WAIT_S)
        with pytest.raises(UnavailableError, match="3 failures in a row"):
            ask(orchestrator, "a")


def test_failures_with_successes_between_them_are_survived():
    engine = FakeEngine(late_errors={step: RuntimeError("late") for step in range(0, 40, 4)})
    with running(engine) as orchestrator:
        failed = sum(ask(orchestrator, "a").answer()[1].error is not None for _ in range(20))
        assert 4 < failed < 20


def test_a_failing_warm_up_is_told(monkeypatch):
    dead = queue.Queue()
    engine = FakeEngine()
    monkeypatch.setattr(engine, "warm_up", lambda params, state: 1 / 0)
    with running(engine, warm_up=True, on_dead=dead.put):
        assert "ZeroDivisionError" in dead.get(timeout=WAIT_S)


def test_a_caller_that_raises_is_cancelled_and_harms_no_other():
    def deliver(event):
        raise RuntimeError("the event loop is closed")

    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine) as orchestrator:
        orchestrator.submit(Request(prompt_ids=[65], max_tokens=100, deliver=deliver))
        assert ask(orchestrator, "a").answer()[0] == "bcd"
    assert engine.steps < 20


def fail_once(engine, call, *, after):
    """The first such call of the engine that follows `after`, if not None, raises."""
    stages = [call] if after is None else [call, after]

    def on_call(made):
        if stages and made.split()[0] == stages[-1]:
            stages.pop()
            if not stages:
                raise RuntimeError(f"{call} broke")

    engine.on_call = on_call


@pytest.mark.parametrize(
    ("call", "after", "loses_the_state"),
    [
        ("prefill", None, False),
        ("first_tokens", "prefill", False),
        ("copy", "prefill", False),
        ("insert", "prefill", True),
        ("generate", "prefill", True),
        ("copy", "generate", True),
    ],
)
def test_a_fault_at_any_stage_fails_its_request_and_the_next_one_works(call, after, loses_the_state):
    engine = FakeEngine(max_concurrent_decodes=2)
    with running(engine) as orchestrator:
        fail_once(engine, call, after=after)
        first = ask(orchestrator, "A", 4, num_samples=2)
        error = first.all()[-1].error
        assert isinstance(error, FailedError)
        assert str(error) == f"request {first.id} failed in the engine: RuntimeError: {call} broke"
        assert texts(ask(orchestrator, "A", 4, num_samples=2).all()) == {0: "BCDE", 1: "LMNO"}
        until(lambda: orchestrator.slots_in_use == 0)
    assert engine.states_made == 1 + loses_the_state


@pytest.mark.parametrize(
    ("call", "after", "carries"),
    [
        ("prefill", None, False),
        ("first_tokens", "prefill", False),
        ("copy", "prefill", False),
        ("first_tokens", "prefill", True),
    ],
)
def test_a_fault_before_insert_harms_no_running_answer(call, after, carries):
    engine = FakeEngine(max_concurrent_decodes=3, carries_pieces=carries, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        good = ask(orchestrator, "a", 8)
        good.next()
        fail_once(engine, call, after=after)
        bad = ask(orchestrator, "A", 4, num_samples=2)
        engine.pace.release(99)
        assert isinstance(bad.all()[-1].error, FailedError)
        assert good.answer()[0] == "cdefghi"
    assert engine.states_made == 1


def test_a_state_that_cannot_be_rebuilt_ends_the_engine(monkeypatch):
    dead, engine = queue.Queue(), FakeEngine(on_generate=raise_on(0))
    with running(engine, on_dead=dead.put) as orchestrator:
        until(lambda: engine.states_made == 1)
        monkeypatch.setattr(engine, "init_decode_state", lambda: 1 / 0)
        assert isinstance(ask(orchestrator, "a").answer()[1].error, UnavailableError), "others may be there to ask"
        assert "ZeroDivisionError" in dead.get(timeout=WAIT_S)


def test_a_fault_in_delivery_fails_only_its_request():
    class Stream(FakeTextStream):
        def feed(self, token_id):
            if token_id == ord("D"):
                raise RuntimeError("no such character")
            return super().feed(token_id)

    engine = FakeEngine(pace=threading.Semaphore(1))
    engine.get_tokenizer().__class__.stream, original = lambda self, shown=(): Stream(self), FakeTokenizer.stream
    try:
        with running(engine) as orchestrator:
            good, bad = ask(orchestrator, "a", 30), ask(orchestrator, "A", 100)
            engine.pace.release(999)
            text, last = bad.answer()
            assert text == "BC"
            assert str(last.error) == f"request {bad.id} failed in delivery: RuntimeError: no such character"
            assert good.answer()[1].error is None
            until(lambda: orchestrator.slots_in_use == 0)
    finally:
        FakeTokenizer.stream = original
    assert engine.states_made == 1
    assert engine.steps < 60, "the failed request's slot was freed"


def test_a_device_that_hangs_does_not_keep_requests_from_being_answered_at_close(monkeypatch):
    monkeypatch.setattr("slipstream.server.scheduler.orchestrator.CLOSE_S", 0.05)
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        hanging, waiting = ask(orchestrator, "a", 9), ask(orchestrator, "a", 9)
        hanging.next()
    assert isinstance(hanging.answer()[1].error, UnavailableError)
    assert isinstance(waiting.answer()[1].error, UnavailableError)
    engine.pace.release(99)
