"""Answers with a grammar, beside answers without."""

import threading
from typing import Any

import numpy as np
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.delivery.result import HostResult
from slipstream.server.delivery.roster import Roster
from slipstream.server.request.constraint import AHEAD, Constraint
from slipstream.server.request.events import FinishReason
from slipstream.server.request.grammar import Grammar
from slipstream.server.scheduler.constraints import Constraints
from slipstream.server.scheduler.parked import Parked

from tests.fakes import STOP_ID, FakeEngine, FakeMatcher, FakeTokenizer
from tests.server.scheduler.loop import Asked, ask, running, texts, until
from tests.server.scheduler.reading import FREE, expected, reading
from tests.server.scheduler.test_loop_turns import House


def noted(engine):
    """Lists that fill with the slots of every step."""
    steps, generate = [], engine.generate

    def noting(params, state, slot_N, *args):
        steps.append(slot_N.tolist())
        return generate(params, state, slot_N, *args)

    engine.generate = noting
    return steps


class Deaf(FakeEngine):
    """Chooses what may not come."""

    def generate(self, params, decode_state, slot_N, page_NJ, allowed=None, width=1):
        return super().generate(params, decode_state, slot_N, page_NJ, width=width)


def constrained(text, max_tokens, grammar, **more):
    request = Asked(text, max_tokens, grammar=Grammar(grammar), **more)
    request.constrain(FakeTokenizer())
    return request


def asked(orchestrator, *args, **more):
    request = constrained(*args, **more)
    orchestrator.submit(request)
    return request


@pytest.mark.parametrize(
    ("max_tokens", "text", "reason"),
    [
        (20, "hello", FinishReason.STOP),
        (6, "hello", FinishReason.STOP),
        (4, "hell", FinishReason.LENGTH),
        (1, "h", FinishReason.LENGTH),
    ],
)
def test_the_grammars_end_ends_the_answer(max_tokens, text, reason):
    with running(FakeEngine()) as orchestrator:
        answer, last = asked(orchestrator, "a", max_tokens, "hello").answer()
        assert (answer, last.finish_reason, last.usage.generated_tokens) == (text, reason, len(text))
        until(lambda: orchestrator.slots_in_use == 0)
        assert ask(orchestrator, "a").answer()[0] == "bcd"


def test_an_answer_of_one_token_is_whole():
    with running(FakeEngine()) as orchestrator:
        answer, last = asked(orchestrator, "a", 9, "h").answer()
        assert (answer, last.finish_reason) == ("h", FinishReason.STOP)
        until(lambda: orchestrator.slots_in_use == 0)


def test_samples_follow_the_grammar_each_for_itself():
    """The fake's first tokens are ten letters apart."""
    with running(FakeEngine(max_concurrent_decodes=3)) as orchestrator:
        events = asked(orchestrator, "A", 9, "**llo", num_samples=3).all()
    assert texts(events) == {0: "BCllo", 1: "LMllo", 2: "VWllo"}
    assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.STOP] * 3


def test_an_answer_with_a_grammar_takes_part_in_every_second_step_and_the_others_in_each(monkeypatch):
    collect = Constraints.collect
    monkeypatch.setattr(Constraints, "collect", lambda self, wait_s: collect(self, 10))  # on the slowest of machines
    house = House(8)
    steps = noted(house.engine)
    free = [house.ask("a", 40) for _ in range(7)]
    house.turns(7)
    request = constrained("a", 40, "twelve chars")
    house.queue.put(request)
    house.idle()
    assert request.answer()[0] == "twelve chars"
    assert [other.answer()[0] for other in free] == [expected("a", 40)] * 7
    (slot,) = set(range(8)) - set(steps[7])
    at = [number for number, slots in enumerate(steps) if slot in slots]
    assert np.diff(at).tolist() == [2] * 10, "of 12 tokens the first is prefill's"
    assert all(len(steps[number]) == 8 and len(steps[number - 1]) == 7 for number in at)


def test_several_with_nobody_beside_them_go_on_together(monkeypatch):
    collect = Constraints.collect
    monkeypatch.setattr(Constraints, "collect", lambda self, wait_s: collect(self, 10))
    house = House(3)
    steps = noted(house.engine)
    requests = [constrained("a", 40, "x" * 20) for _ in range(3)]
    for request in requests:
        house.queue.put(request)
        house.turns(2)
    house.turns(60)
    assert [request.answer()[0] for request in requests] == ["x" * 20] * 3
    together = [number for number, slots in enumerate(steps) if len(slots) == 3]
    assert len(together) > 12
    assert together == list(range(together[0], together[-1] + 1)), "no step of a part of them between"


def test_alone_it_takes_part_in_every_step():
    engine = FakeEngine()
    steps = noted(engine)
    with running(engine) as orchestrator:
        assert asked(orchestrator, "a", 40, "twelve chars").answer()[0] == "twelve chars"
        until(lambda: orchestrator.slots_in_use == 0)
    assert steps == [steps[0]] * 11, "no step without it"


@pytest.mark.parametrize("carries", [False, True])
def test_it_goes_on_where_it_was_when_it_gave_its_pages_back(carries):
    text = "the quick brown fox jumps over the lazy dog"
    engine = reading(2, pages=14, carries_pieces=carries)
    with running(engine) as orchestrator:
        elder = ask(orchestrator, "abc", 44, sampling=FREE)
        elder.next()
        younger = asked(orchestrator, "xyz", 60, text, sampling=FREE)
        answer, last = younger.answer()
        assert (answer, last.finish_reason) == (text, FinishReason.STOP)
        assert elder.answer()[0] == expected("abc", 44)[1:]
        until(lambda: orchestrator.slots_in_use == 0)
    prefills = [call for call in engine.log if call.startswith("prefill ")]
    assert len(prefills) > 2, "it was pre-empted"


def test_a_step_that_had_nothing_to_choose_from_fails_its_request_alone():
    with running(Deaf()) as orchestrator:
        other = ask(orchestrator, "a", 30, sampling=SamplingParams(ignore_eos=True))
        *_, last = asked(orchestrator, "a", 9, "hello").all()
        assert isinstance(last.error, RefusedError)
        assert "its grammar allows no token that min_tokens, stop_token_ids" in str(last.error)
        assert len(other.answer()[0]) == 30
        until(lambda: orchestrator.slots_in_use == 0)


def test_a_library_that_panics_fails_its_request_alone(monkeypatch):
    class Panicking(FakeMatcher):
        def copy(self):
            return Panicking(self.text)

        def take(self, token_id):
            raise BaseException("index out of bounds")

    with running(FakeEngine()) as orchestrator:
        other = ask(orchestrator, "a", 20)
        with monkeypatch.context() as patched:
            patched.setattr(FakeTokenizer, "matcher", lambda self, text: Panicking(text))
            *_, last = asked(orchestrator, "a", 9, "hello").all()
        assert "comes to no end: BaseException: index out of bounds" in str(last.error)
        assert len(other.answer()[0]) == 20


def test_one_that_is_cancelled_while_its_grammar_is_at_work_gives_its_slot_back(monkeypatch):
    at_work, goes_on = threading.Event(), threading.Event()

    class Slow(FakeMatcher):
        def copy(self):
            return Slow(self.text)

        def take(self, token_id):
            at_work.set()
            assert goes_on.wait(10)
            super().take(token_id)

    monkeypatch.setattr(FakeTokenizer, "matcher", lambda self, text: Slow(text))
    with running(FakeEngine()) as orchestrator:
        request = asked(orchestrator, "a", 9, "*****")
        assert at_work.wait(10)
        assert ask(orchestrator, "a").answer()[0] == "bcd", "nobody waits for it"
        orchestrator.cancel(request)
        assert request.answer()[1].finish_reason is FinishReason.CANCELLED
        until(lambda: orchestrator.slots_in_use == 0)
        goes_on.set()
        assert ask(orchestrator, "a").answer()[0] == "bcd"


def brought(sample, letter):
    """A step's result for it."""
    one_B = np.ones(1, np.int32)
    none: Any = [None] * 8
    roster = Roster.empty(1, 1).having(0, sample)
    return HostResult(roster, np.array([[ord(letter)]], np.int32), one_B, one_B, np.zeros(1, bool), *none)


def test_one_that_left_is_parked_once_what_follows_was_collected():
    """Were it parked before, it could decode again by then: with what may follow another token."""
    (sample,) = constrained("a", 9, "hi").samples
    made = threading.Event()
    constraints, parked = Constraints(on_made=made.set), Parked()
    parked.leave(sample, np.array([ord("a")], np.int32))
    parked.read(brought(sample, "h"))
    constraints.read(brought(sample, "h"))
    assert made.wait(10)
    assert list(parked.left()) == []
    assert constraints.collect(10) == [sample]
    assert list(parked.left()) == [(sample, list(b"ah"))]
    constraints.close()


def test_one_that_left_and_is_over_is_not_parked(monkeypatch):
    """Not even while delivery is behind and nobody has been told."""
    collect = Constraints.collect
    monkeypatch.setattr(Constraints, "collect", lambda self, wait_s: collect(self, 10))
    house, request = House(1), constrained("a", 9, "hi")
    (sample,), loop, posted = request.samples, house.loop, []
    monkeypatch.setattr(loop.delivery, "end_sample", posted.append)
    house.queue.put(request)
    until(lambda: house.turns() or any(result.is_step for result in loop._execution.pending))
    loop._holdings.preempt(sample)
    house.turns(2)
    assert posted == [sample]
    assert not loop._holdings.parked


def tokens_of(word_W):
    return np.flatnonzero(np.unpackbits(word_W.view(np.uint8), bitorder="little")).tolist()


def constraint_of(text, matcher=FakeMatcher, end_ids=(STOP_ID,)):
    return Constraint(matcher(text), end_ids)


EVERY = list(range(256))


@pytest.mark.parametrize(
    ("text", "forced", "behind"),
    [
        ("a", "", [ord("a")]),  # nothing follows it
        ("ab", "a", [ord("b")]),
        ("*b", "", EVERY),
        ("ab*", "ab", EVERY),
        ("abc*d", "abc", EVERY),
        ("x" * 40, "x" * AHEAD, [ord("x")]),
    ],
)
def test_what_must_come_is_known_up_to_where_others_may(text, forced, behind):
    constraint = constraint_of(text)
    assert constraint.forced == list(forced.encode())
    assert tokens_of(constraint.allowed_behind_W) == behind
    assert tokens_of(constraint.allowed_W) == ([ord(text[0])] if text[0] != "*" else EVERY)
    assert (constraint.is_over, constraint.error) == (False, ""), "not before it was read"


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
@pytest.mark.parametrize("text", ["a", "abcd", "**", "ab*cd*", "x" * 40])
def test_it_is_over_when_all_was_read(text, at_once):
    """Steps bring what must come, as far as they have room, and one token behind it."""
    constraint, answer = constraint_of(text), text.replace("*", "?")
    while not constraint.is_over:
        assert not constraint.error
        count = min(len(constraint.forced) + 1, at_once)
        constraint.take(list(answer[:count].encode()))
        answer = answer[count:]
    assert answer == ""


def test_a_token_that_ends_the_answer_is_not_looked_past():
    assert constraint_of("abc*", end_ids=(ord("b"),)).forced == [ord("a")]


def test_another_token_than_must_come_fails():
    constraint = constraint_of("abc*")
    constraint.take(list(b"ax"))
    assert "its grammar allows no token that min_tokens" in constraint.error


def test_what_fails_while_it_looks_ahead_fails_when_it_gets_there():
    class Failing(FakeMatcher):
        def take(self, token_id):
            super().take(ord("?") if chr(token_id) == "c" else token_id)

    constraint = constraint_of("abcd", Failing)
    assert constraint.forced == [*b"ab"]
    constraint.take([*b"ab"])
    assert constraint.error == ""
    constraint.take([*b"c"])
    assert "comes to no end: '?' does not come before 'cd'" in constraint.error


@pytest.mark.parametrize(
    ("text", "max_tokens", "answer", "steps"),
    [
        ("abcd", 20, "abcd", 1),
        ("hello, world", 20, "hello, world", 3),
        ("*ab*cd*", 20, "bab" + "ccd" + "e", 3),
        ("hello, world", 7, "hello, ", 2),
    ],
)
def test_wide_steps_bring_what_must_come(text, max_tokens, answer, steps):
    """The first token is prefill's."""
    engine = FakeEngine(widths=(1, 4))
    noted_steps = noted(engine)
    with running(engine) as orchestrator:
        text, last = asked(orchestrator, "a", max_tokens, text).answer()
        assert text == answer
        assert last.usage.generated_tokens == len(answer)
        until(lambda: orchestrator.slots_in_use == 0)
    assert steps <= len(noted_steps) < len(answer) - 1


def test_what_may_end_an_answer():
    def ends(**sampling):
        request = constrained("a", 9, "x", sampling=SamplingParams(**sampling))
        constraint = request.samples[0].constraint
        assert isinstance(constraint, Constraint)
        constraint.take([ord("x")])
        return tokens_of(constraint.allowed_W)

    assert ends() == [STOP_ID]
    assert ends(stop_token_ids=(7,)) == [7, STOP_ID]
    assert ends(ignore_eos=True) == []
    assert ends(ignore_eos=True, stop_token_ids=(7,)) == [7]


def test_a_stop_string_cuts_as_ever():
    with running(FakeEngine()) as orchestrator:
        answer, last = asked(orchestrator, "a", 9, "hello", stop_strings=("ll",)).answer()
    assert (answer, last.finish_reason) == ("he", FinishReason.STOP)


def test_a_grammar_that_cannot_be_compiled_is_refused_before_it_is_handed_in():
    with pytest.raises(RefusedError, match="it is bad"):
        constrained("a", 9, "bad")
