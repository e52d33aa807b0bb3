"""The loop against a fake engine: order, slots, cancels, failures."""

import itertools
import threading
import time

import pytest
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.errors import QueueFullError, UnavailableError
from slipstream.server.observe.metrics import Metrics, Outcome
from slipstream.server.request.events import FinishReason

from tests.fakes import FakeEngine
from tests.server.scheduler.loop import WAIT_S, Asked, ask, running, until


def test_one_request_goes_through_the_loop_in_order():
    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine, warm_up=True) as orchestrator:
        text, last = ask(orchestrator, "a").answer()
    assert (text, last.finish_reason) == ("bcd", FinishReason.LENGTH)
    assert engine.log == ["warm_up", "prefill a", "insert 0", "generate", "generate"]


def test_max_tokens_1_needs_no_slot():
    engine = FakeEngine()
    with running(engine) as orchestrator:
        assert ask(orchestrator, "a", 1).answer()[0] == "b"
    assert engine.log == ["prefill a", "insert"], "its rows are kept as a prefix"


def test_max_tokens_1_does_not_wait_for_a_slot():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        running_one = ask(orchestrator, "a", 9)
        running_one.next()
        engine.pace.release(2)
        assert ask(orchestrator, "A", 1).answer()[0] == "B"
        assert orchestrator.slots_in_use == 1
        engine.pace.release(99)


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
    assert "generate" in engine.log[engine.log.index("insert 1") :]


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
    inserted = engine.log.index("prefill A")
    assert engine.log[inserted : inserted + 2] == ["prefill A", "insert 0"]
    assert engine.log[inserted - 1] == "generate", "the old request's last step was in flight"


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


def test_free_slots_admit_beside_the_queue():
    """As many at once as there are free slots and places in the queue."""
    engine = FakeEngine(max_concurrent_decodes=2, pace=threading.Semaphore(0))
    with running(engine, max_queued=4) as orchestrator:
        requests = [ask(orchestrator, "a", 9) for _ in range(6)]
        engine.pace.release(2)  # a turn may have passed before the second came
        until(lambda: (orchestrator.slots_in_use, orchestrator.queue_depth) == (2, 4))
        with pytest.raises(QueueFullError, match="4 requests wait already and max_queued=4;"):
            ask(orchestrator, "a", 3)
        engine.pace.release(99)
        assert [request.answer()[0] for request in requests] == ["bcdefghij"] * 6


def test_a_full_queue_refuses_with_both_numbers():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine, max_queued=2) as orchestrator:
        running_one = ask(orchestrator, "a", 9)
        running_one.next()
        waiting = [ask(orchestrator, "a", 3) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already and max_queued=2"):
            ask(orchestrator, "a", 3)
        engine.pace.release(99)
        for request in waiting:
            assert request.answer()[0] == "bcd"


def test_close_answers_every_request_once():
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        requests = [ask(orchestrator, "a", 100) for _ in range(4)]
        requests[0].next()
        engine.pace.release(1000)
    for request in requests[1:]:
        assert isinstance(request.answer()[1].error, UnavailableError)
        assert request.events.empty()


def test_sampling_reaches_the_engine():
    engine, sampling = FakeEngine(), SamplingParams(temperature=0.5, seed=7)
    with running(engine) as orchestrator:
        ask(orchestrator, "a", sampling=sampling).answer()
    assert engine.samplings == [sampling]


def test_metrics_count_every_end():
    class Counting(Metrics):
        def __init__(self):
            super().__init__()
            self.seen, self.durations = [], []

        def ended(self, outcome, **about):
            self.seen.append((outcome, about))

        def rejected(self):
            self.seen.append((Outcome.REJECTED, {}))

        def prefill(self, seconds):
            self.durations.append(("prefill", seconds))

        def step(self, seconds, slots):
            assert slots == 1
            self.durations.append(("step", seconds))

    metrics, engine = Counting(), FakeEngine(max_concurrent_decodes=1, step_s=0.002)
    with running(engine, metrics=metrics, max_queued=1) as orchestrator:
        ask(orchestrator, "abc", 3, id="mine").answer()
        running_one = ask(orchestrator, "\x01", 200)
        running_one.next()
        queued = ask(orchestrator, "a", deadline=time.monotonic() + 0.02)
        with pytest.raises(QueueFullError):
            ask(orchestrator, "a")
        queued.answer()
        orchestrator.cancel(running_one)
        running_one.answer()
        engine.on_prefill = lambda prompt: 1 / 0
        ask(orchestrator, "a").answer()
    outcomes = [outcome for outcome, _ in metrics.seen]
    assert outcomes == [Outcome.OK, Outcome.REJECTED, Outcome.DEADLINE, Outcome.CANCELLED, Outcome.FAILED]
    ok, _, deadline, cancelled, failed = (about for _, about in metrics.seen)
    assert (ok["request_id"], ok["prompt_tokens"], ok["generated_tokens"]) == ("mine", 3, 3)
    assert 0 <= ok["queue_s"] <= ok["ttft_s"] <= ok["e2e_s"]
    assert ok["tpot_s"] == pytest.approx((ok["e2e_s"] - ok["ttft_s"]) / 2)
    assert (deadline["queue_s"], deadline["ttft_s"], deadline["generated_tokens"]) == (None, None, 0)
    assert cancelled["generated_tokens"] > 0
    assert failed["ttft_s"] is None
    kinds = [kind for kind, _ in metrics.durations]
    assert kinds[:3] == ["prefill", "step", "step"]
    assert 0.002 <= metrics.durations[2][1] < 1
