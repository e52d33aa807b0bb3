"""The loop against a fake engine: order, slots, cancels, failures."""

import itertools
import queue
import random
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling_params import SamplingParams
from slipstream.server.errors import DeadlineError, FailedError, QueueFullError, UnavailableError
from slipstream.server.metrics import Metrics, Outcome
from slipstream.server.orchestrator import Orchestrator
from slipstream.server.request import FinishReason, Request, TokenLogprob

from tests.fakes import FakeEngine, FakeTextStream, FakeTokenizer

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
        events = self.all()
        return "".join(event.text for event in events), events[-1]

    def all(self):
        """What has not been read yet, to the last event; and nothing comes after it."""
        events = [self.next()]
        while not events[-1].is_last:
            events.append(self.next())
        assert self.events.empty()
        return events


def texts(events):
    """By sample."""
    found = {}
    for event in events:
        found[event.index] = found.get(event.index, "") + event.text
    return found


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


# Stop strings, stop tokens, samples, log-probabilities.


@pytest.mark.parametrize(
    ("stops", "text", "tokens"),
    [
        (("f",), "bcde", 5),
        (("def",), "bc", 5),
        (("zz", "de"), "bc", 4),
        (("b",), "", 1),
        (("nope", "jklx"), "bcdefghijk", 10),
    ],
)
def test_a_stop_string_ends_the_answer_across_tokens_and_is_not_part_of_it(stops, text, tokens):
    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine) as orchestrator:
        events = (request := ask(orchestrator, "a", 10, stop_strings=stops)).all()
        assert texts(events) == {0: text}
        ids = [token_id for event in events for token_id in event.token_ids]
        assert ids == list(range(98, 98 + tokens)), "up to the token in which the stop string ended, and no more"
        is_stopped = stops[0] != "nope"
        assert events[-1].finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
        assert events[-1].usage.generated_tokens == request.delivered == tokens
        assert ask(orchestrator, "A", 4).answer()[0] == "BCDE", "the slot is free again, and no token is left over"
        until(lambda: orchestrator.slots_in_use == 0)


def test_a_stop_string_frees_its_slot_within_the_steps_under_way():
    """Steps come one by one: the stop string is read with one step in flight and at most one more started."""
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 200, stop_strings=("e",))
        for _ in range(4):
            event = request.next()
            engine.pace.release()
        assert (event.finish_reason, event.text) == (FinishReason.STOP, "")
        engine.pace.release(99)
        until(lambda: orchestrator.slots_in_use == 0)
    assert engine.steps <= 6


def test_stop_token_ids_and_ignore_eos():
    with running(FakeEngine()) as orchestrator:
        assert ask(orchestrator, "a", 9, stop_token_ids=(ord("e"), ord("d"))).answer()[0] == "bc"
        assert ask(orchestrator, "a", 9, stop_token_ids=(ord("b"),)).answer()[0] == ""
        text, last = ask(orchestrator, "w", 6, ignore_eos=True).answer()
        assert (text, last.finish_reason) == ("xyz{|}", FinishReason.LENGTH)


def test_several_samples_come_from_one_prefill():
    """The fake's samples start ten letters apart."""
    engine, sampling = FakeEngine(max_concurrent_decodes=3), SamplingParams(temperature=1.0, seed=7)
    with running(engine) as orchestrator:
        events = ask(orchestrator, "A", 4, num_samples=3, sampling=sampling).all()
        until(lambda: orchestrator.slots_in_use == 0)
    assert texts(events) == {0: "BCDE", 1: "LMNO", 2: "VWXY"}
    assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.LENGTH] * 3
    assert events[-1].usage.generated_tokens == 12
    assert [call.split()[0] for call in engine.log[:6]] == ["prefill", "resample", "resample", *["insert"] * 3]
    seeds = [sampling.seed for sampling in engine.samplings]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


def test_samples_end_one_by_one():
    """ "p" answers q..., and the second sample, ten letters later, begins with the stop token."""
    with running(FakeEngine(max_concurrent_decodes=2)) as orchestrator:
        events = ask(orchestrator, "p", 20, num_samples=2, stop_strings=("y",)).all()
    assert texts(events) == {0: "qrstuvwx", 1: ""}
    assert [event.index for event in events if event.finish_reason is FinishReason.STOP] == [1, 0]
    assert [event.index for event in events if event.usage] == [0]


def test_samples_of_one_token_need_no_slots():
    engine = FakeEngine(max_concurrent_decodes=2)
    with running(engine) as orchestrator:
        assert texts(ask(orchestrator, "A", 1, num_samples=2).all()) == {0: "B", 1: "L"}
    assert engine.steps == 0


def test_samples_wait_until_all_their_slots_are_free_and_are_not_overtaken():
    engine = FakeEngine(max_concurrent_decodes=2, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        first = ask(orchestrator, "a", 6)
        first.next()
        wide, narrow = ask(orchestrator, "A", 3, num_samples=2), ask(orchestrator, "0", 3)
        engine.pace.release(99)
        assert texts(wide.all()) == {0: "BCD", 1: "LMN"}
        assert narrow.answer()[0] == "123"
        first.answer()
    assert [call for call in engine.log if call.startswith("prefill")] == ["prefill a", "prefill A", "prefill 0"]


def test_more_samples_than_slots_are_refused():
    with (
        running(FakeEngine(max_concurrent_decodes=2)) as orchestrator,
        pytest.raises(RefusedError, match="num_samples=3"),
    ):
        ask(orchestrator, "a", num_samples=3)


def test_cancelling_frees_the_slots_of_all_samples():
    engine = FakeEngine(max_concurrent_decodes=3, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "A", 100, num_samples=3)
        request.next()
        until(lambda: orchestrator.slots_in_use == 3)
        orchestrator.cancel(request)
        engine.pace.release(99)
        events = request.all()
        assert {event.index: event.finish_reason for event in events if event.finish_reason} == {
            index: FinishReason.CANCELLED for index in range(3)
        }
        until(lambda: orchestrator.slots_in_use == 0)
    assert engine.steps <= 2


def test_logprobs_of_the_chosen_and_the_likeliest_tokens():
    """The fake's are minus an eighth of the id; see there."""
    with running(FakeEngine()) as orchestrator:
        none = ask(orchestrator, "a", 2)
        chosen = ask(orchestrator, "a", 2, sampling=SamplingParams(logprobs=0))
        top = ask(orchestrator, "@", 2, sampling=SamplingParams(logprobs=2))
        assert [event.logprobs for event in none.all()] == [(), ()]
        assert [event.logprobs for event in chosen.all()] == [(TokenLogprob(-98 / 8),), (TokenLogprob(-99 / 8),)]
        assert [event.logprobs for event in top.all()] == [
            (TokenLogprob(-65 / 8, ((65, -65 / 8), (66, -65 / 8 - 1))),),
            (TokenLogprob(-66 / 8, ((66, -66 / 8), (67, -66 / 8 - 1))),),
        ]


def test_prompt_logprobs_come_first_and_once():
    with running(FakeEngine()) as orchestrator:
        events = ask(orchestrator, "aB@", 3, prompt_logprobs=True, num_samples=2).all()
    assert events[0].prompt_logprobs == (0.0, -66 / 8, -64 / 8)
    assert all(event.prompt_logprobs is None for event in events[1:])
    assert texts(events) == {0: "ABC", 1: "KLM"}


def test_usage_tells_tokens_and_times():
    with running(FakeEngine(step_s=0.01)) as orchestrator:
        usage = ask(orchestrator, "abc", 5).answer()[1].usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (3, 5)
    assert 0 <= usage.queue_ms <= usage.ttft_ms
    assert usage.total_ms - usage.ttft_ms > 4 * 10 * 0.9


# Deadlines.


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


# Failures: at every stage, one after the other, the next request works.


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
        ("resample", "prefill", False),
        ("copy", "prefill", False),
        ("insert", "prefill", True),
        ("generate", "prefill", True),
        ("copy", "generate", True),
        ("free", "prefill", True),
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


@pytest.mark.parametrize(("call", "after"), [("prefill", None), ("resample", "prefill"), ("copy", "prefill")])
def test_a_fault_before_insert_harms_no_running_answer(call, after):
    engine = FakeEngine(max_concurrent_decodes=3, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        good = ask(orchestrator, "a", 8)
        good.next()
        fail_once(engine, call, after=after)
        bad = ask(orchestrator, "A", 4, num_samples=2)
        engine.pace.release(99)
        assert isinstance(bad.all()[-1].error, FailedError)
        assert good.answer()[0] == "cdefghi"
    assert engine.states_made == 1


def test_a_state_that_cannot_be_rebuilt_ends_the_engine():
    dead, engine = queue.Queue(), FakeEngine(on_generate=raise_on(0))
    with running(engine, on_dead=dead.put) as orchestrator:
        until(lambda: engine.states_made == 1)
        engine.init_decode_state = lambda: 1 / 0
        assert isinstance(ask(orchestrator, "a").answer()[1].error, FailedError)
        assert "ZeroDivisionError" in dead.get(timeout=WAIT_S)


def test_a_fault_in_delivery_fails_only_its_request():
    class Stream(FakeTextStream):
        def feed(self, token_id):
            if token_id == ord("D"):
                raise RuntimeError("no such character")
            return super().feed(token_id)

    engine = FakeEngine(pace=threading.Semaphore(1))
    engine.get_tokenizer().__class__.stream, original = lambda self: Stream(self), FakeTokenizer.stream
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
    monkeypatch.setattr("slipstream.server.orchestrator.CLOSE_S", 0.05)
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        hanging, waiting = ask(orchestrator, "a", 9), ask(orchestrator, "a", 9)
        hanging.next()
    assert isinstance(hanging.answer()[1].error, UnavailableError)
    assert isinstance(waiting.answer()[1].error, UnavailableError)
    engine.pace.release(99)


# Probes and metrics.


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


# The cost of a step, and everything at once.


def calls_per_step(slots, steps=20):
    """Calls, of Python and of C, that the loop makes in so many steps with every slot live."""
    counted, engine = [], FakeEngine(max_concurrent_decodes=slots, cache_length=10_000)
    begin = slots + 20

    def on_generate(step):  # in the loop's thread
        if step == begin:
            sys.setprofile(lambda frame, event, argument: counted.append(event))
        elif step == begin + steps:
            sys.setprofile(None)

    engine.on_generate = on_generate
    with running(engine, max_queued=slots) as orchestrator:
        requests = [ask(orchestrator, "a", slots + 100, ignore_eos=True) for _ in range(slots)]
        for request in requests:
            request.all()
    return sum(event.endswith("call") for event in counted) / steps


def test_a_step_costs_the_loop_the_same_however_many_slots_are_live():
    """Counted, not timed: nothing in the loop is done once a slot."""
    few, many = calls_per_step(2), calls_per_step(64)
    assert few == pytest.approx(many, abs=1)  # a wait may take a call more
    assert 10 < few < 100


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_answers_every_request_once_and_leaves_nothing_behind(seed):
    """Cancels, deadlines, stop strings, samples, priorities and faults at random, from several threads."""
    faults = random.Random(seed)

    def on_call(call):
        if call.startswith(("prefill", "insert", "generate")) and faults.random() < 0.003:
            raise RuntimeError(f"{call} broke")

    metrics, engine = Metrics(), FakeEngine(max_concurrent_decodes=4, step_s=0.0002, on_call=on_call)
    threads = threading.active_count()
    with running(engine, max_queued=20, max_queued_tokens=100, metrics=metrics) as orchestrator:
        asked, refused = [], []

        def work(number):
            dice = random.Random(seed * 100 + number)
            for _ in range(40):
                time.sleep(dice.random() * 0.004)
                samples = dice.choice([1, 1, 1, 2, 4])
                deadline = time.monotonic() + dice.random() * 0.1 if dice.random() < 0.3 else None
                stops = dice.choice([(), ("x",), ("fg", "Z")])
                request = Asked(
                    dice.choice(["a", "A", "0123456789", "w"]),
                    dice.choice([1, 2, 10, 60]),
                    num_samples=samples,
                    deadline=deadline,
                    stop_strings=stops,
                    priority=dice.randint(-10, 10),
                    sampling=SamplingParams(logprobs=dice.choice([None, 0, 3])),
                )
                try:
                    orchestrator.submit(request)
                except (QueueFullError, DeadlineError) as error:
                    refused.append(error)
                    continue
                asked.append(request)
                if dice.random() < 0.3:
                    time.sleep(dice.random() * 0.01)
                    orchestrator.cancel(request)

        workers = [threading.Thread(target=work, args=[number]) for number in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for request in asked:
            events = request.all()
            check_answer(request, events)
        until(lambda: orchestrator.slots_in_use == 0)
        assert (orchestrator.queue_depth, orchestrator._queue.tokens) == (0, 0)
        assert not orchestrator._live
        assert not orchestrator._delivery._texts
    until(lambda: threading.active_count() <= threads)  # fewer: those of a test before may have ended
    total = sum(
        metrics.registry.get_sample_value("slipstream_requests_total", {"outcome": outcome.value})
        for outcome in Outcome
    )
    assert total == len(asked) + sum(isinstance(error, QueueFullError) for error in refused)


def check_answer(request, events):
    """Each sample counts up from its first token, ends once, and holds no stop string."""
    if events[-1].error is not None:
        assert isinstance(events[-1].error, FailedError)
    else:
        reasons = [event.index for event in events if event.finish_reason]
        assert sorted(reasons) == list(range(request.num_samples))
        assert events[-1].usage.generated_tokens == sum(len(event.token_ids) for event in events)
    for index, text in texts(events).items():
        ids = [token_id for event in events if event.index == index for token_id in event.token_ids]
        first = request.prompt_ids[-1] + 1 + 10 * index
        assert ids == list(range(first, first + len(ids)))
        assert len(ids) <= request.max_tokens
        assert not any(stop in text for stop in request.stop_strings)
