"""The loop against a fake engine: order, slots, cancels, failures."""

import itertools
import queue
import threading
import time
from contextlib import contextmanager

import pytest
from slipstream.engine_impl.sampling_params import SamplingParams
from slipstream.server.errors import FailedError, QueueFullError, UnavailableError
from slipstream.server.orchestrator import Orchestrator
from slipstream.server.request import FinishReason, Request

from tests.fakes import FakeEngine

WAIT_S = 10


class Asked(Request):
    """A request whose events can be waited for."""

    def __init__(self, text: str, max_tokens: int = 3, **more) -> None:
        self.events = queue.Queue()
        super().__init__(prompt_ids=list(text.encode()), max_tokens=max_tokens, deliver=self.events.put, **more)

    def next(self):
        return self.events.get(timeout=WAIT_S)

    def answer(self):
        """(text, last event)."""
        text = ""
        while True:
            event = self.next()
            text += event.text
            if event.is_last:
                return text, event


@contextmanager
def running(engine, **more):
    orchestrator = Orchestrator(engine, None, **{"max_queued": 10, "warm_up": False} | more)
    orchestrator.start()
    try:
        yield orchestrator
    finally:
        orchestrator.close()


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def ask(orchestrator, *args, **more):
    request = Asked(*args, **more)
    orchestrator.submit(request)
    return request


def test_one_request_goes_through_the_loop_in_order():
    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine, warm_up=True) as orchestrator:
        text, last = ask(orchestrator, "a").answer()
    assert (text, last.finish_reason) == ("bcd", FinishReason.LENGTH)
    assert engine.log == ["warm_up", "prefill a", "insert 0", "generate", "generate", "free 0"]


def test_max_tokens_1_needs_no_slot():
    engine = FakeEngine()
    with running(engine) as orchestrator:
        assert ask(orchestrator, "a", 1).answer()[0] == "b"
    assert engine.log == ["prefill a"]


@pytest.mark.parametrize(("prompt", "text"), [("w", "xyz"), ("y", "z"), ("z", "")])
def test_the_stop_token_ends_the_answer_and_is_not_part_of_it(prompt, text):
    with running(FakeEngine()) as orchestrator:
        answer, last = ask(orchestrator, prompt, 9).answer()
    assert (answer, last.finish_reason) == (text, FinishReason.STOP)


def test_the_first_token_comes_before_the_first_step_ends():
    """Steps are held back: the first token must not wait for them."""
    engine = FakeEngine(pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 9)
        assert request.next().token_ids == (ord("b"),)
        engine.pace.release(99)


def test_a_new_request_enters_while_others_run():
    engine = FakeEngine(pace=threading.Semaphore(2))
    with running(engine) as orchestrator:
        first = ask(orchestrator, "a", 20)
        first.next()
        second = ask(orchestrator, "A", 3)
        engine.pace.release(99)
        assert second.answer()[0] == "BCD"
        assert first.answer()[0] == "cdefghijklmnopqrstu"
    assert engine.log.index("prefill A") < engine.log.index("free 0")


def test_requests_share_steps_and_queue_for_slots():
    with running(FakeEngine(max_concurrent_decodes=3)) as orchestrator:
        requests = [ask(orchestrator, chr(ord("A") + i), 1 + i % 5) for i in range(10)]
        for i, request in enumerate(requests):
            expected = "".join(chr(ord("A") + i + 1 + j) for j in range(1 + i % 5))
            assert request.answer()[0] == expected


def test_at_most_one_prefill_between_steps():
    engine = FakeEngine(max_concurrent_decodes=8, on_prefill=lambda prompt: started.wait(WAIT_S))
    started = threading.Event()
    with running(engine) as orchestrator:
        requests = [ask(orchestrator, "a", 12) for _ in range(8)]
        started.set()
        for request in requests:
            request.answer()
    calls = [call.split()[0] for call in engine.log if call.startswith(("prefill", "generate"))]
    assert ("prefill", "prefill") not in itertools.pairwise(calls)


def test_late_tokens_of_a_cancelled_request_do_not_reach_the_slots_next_owner():
    """One slot, a step in flight when its request is cancelled, the next request inserted before that step is read."""
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        old, new = ask(orchestrator, "a", 100), ask(orchestrator, "A", 4)
        assert [old.next().token_ids for _ in range(2)] == [(ord("b"),), (ord("c"),)]
        orchestrator.cancel(old)
        engine.pace.release(99)
        assert new.answer()[0] == "BCDE"
        assert old.answer()[1].finish_reason is FinishReason.CANCELLED
    freed = engine.log.index("free 0")
    assert engine.log[freed : freed + 3] == ["free 0", "prefill A", "insert 0"]
    assert engine.log[freed - 1] == "generate", "the old request's last step was in flight"


def test_late_tokens_after_a_stop_do_not_reach_the_slots_next_owner():
    """A stop is seen one step late; that step's token belongs to nobody."""
    with running(FakeEngine(max_concurrent_decodes=1)) as orchestrator:
        requests = [ask(orchestrator, "y", 50), ask(orchestrator, "A", 4), ask(orchestrator, "x", 50)]
        assert [request.answer()[0] for request in requests] == ["z", "BCDE", "yz"]


def test_cancel_frees_the_slot_before_the_next_step():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 100)
        request.next()
        orchestrator.cancel(request)
        engine.pace.release(99)
        assert request.answer()[1].finish_reason is FinishReason.CANCELLED
        until(lambda: orchestrator.slots_in_use == 0)
    assert engine.steps <= 2, "two can be under way when the cancel comes, and none starts after it"


def test_cancel_while_prefilling():
    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine) as orchestrator:
        engine.on_prefill = lambda prompt: orchestrator.cancel(request)
        request = Asked("a", 100)
        orchestrator.submit(request)
        assert request.answer()[1].finish_reason is FinishReason.CANCELLED
    assert engine.steps <= 1


def test_cancel_while_queued_never_prefills():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        first = ask(orchestrator, "a", 3)
        first.next()
        queued = ask(orchestrator, "A", 3)
        orchestrator.cancel(queued)
        assert queued.answer()[1].finish_reason is FinishReason.CANCELLED
        engine.pace.release(99)
        first.answer()
    assert "prefill A" not in engine.log
    assert queued.events.empty()


def test_a_full_queue_refuses_with_both_numbers():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine, max_queued=2) as orchestrator:
        running_one = ask(orchestrator, "a", 3)
        running_one.next()
        waiting = [ask(orchestrator, "a", 3) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already and max_queued=2"):
            ask(orchestrator, "a", 3)
        engine.pace.release(99)
        for request in waiting:
            assert request.answer()[0] == "bcd"


def raise_on(*steps):
    def on_generate(step):
        if step in steps:
            raise RuntimeError(f"step {step} broke\nand more lines")

    return on_generate


def test_a_failed_step_fails_its_requests_and_the_next_ones_work():
    engine = FakeEngine(on_generate=raise_on(1))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 9)
        error = request.answer()[1].error
        assert isinstance(error, FailedError)
        assert str(error) == f"request {request.id} failed in the engine: RuntimeError: step 1 broke"
        assert ask(orchestrator, "a").answer()[0] == "bcd"
    assert engine.states_made == 2


def test_an_error_that_shows_when_tokens_are_read_is_a_failed_step_too():
    engine = FakeEngine(late_errors={0: RuntimeError("late")})
    with running(engine) as orchestrator:
        assert isinstance(ask(orchestrator, "a", 2).answer()[1].error, FailedError)
        assert ask(orchestrator, "a").answer()[0] == "bcd"


def test_a_failed_prefill_fails_only_its_request():
    def on_prefill(prompt):
        if prompt == [ord("B")]:
            raise RuntimeError("no")

    engine = FakeEngine(on_prefill=on_prefill, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        good = ask(orchestrator, "a", 5)
        good.next()
        bad = ask(orchestrator, "B", 5)
        engine.pace.release(99)
        assert isinstance(bad.answer()[1].error, FailedError)
        assert good.answer()[0] == "cdef"
    assert engine.states_made == 1


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


def test_a_failing_warm_up_is_told():
    dead = queue.Queue()
    engine = FakeEngine()
    engine.warm_up = lambda params, state: 1 / 0
    with running(engine, warm_up=True, on_dead=dead.put):
        assert "ZeroDivisionError" in dead.get(timeout=WAIT_S)


def test_close_answers_every_request_once():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        requests = [ask(orchestrator, "a", 100) for _ in range(4)]
        requests[0].next()
        engine.pace.release(1000)
    for request in requests[1:]:
        assert isinstance(request.answer()[1].error, UnavailableError)
        assert request.events.empty()


def test_a_caller_that_raises_is_cancelled_and_harms_no_other():
    def deliver(event):
        raise RuntimeError("the event loop is closed")

    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine) as orchestrator:
        orchestrator.submit(Request(prompt_ids=[65], max_tokens=100, deliver=deliver))
        assert ask(orchestrator, "a").answer()[0] == "bcd"
    assert engine.steps < 20


def test_sampling_reaches_the_engine():
    engine, sampling = FakeEngine(), SamplingParams(temperature=0.5, seed=7)
    with running(engine) as orchestrator:
        ask(orchestrator, "a", sampling=sampling).answer()
    assert engine.samplings == [sampling]
