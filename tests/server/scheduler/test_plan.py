"""What a turn does, without an engine."""

from slipstream.server.request.request import Request
from slipstream.server.scheduler.plan import StepPlan, plan
from slipstream.server.scheduler.slots import Slots


def request(**more):
    return Request(**{"prompt_ids": [1], "max_tokens": 3, "deliver": print} | more)


def turn(slots, waiting=None, *, ended=(), now=0.0, probe=False):
    return plan(waiting=waiting, slots=slots, ended=ended, now=now, probe=probe)


def seated(slots, **more):
    sample = request(**more).samples[0]
    slots.give(sample)
    return sample


NOTHING = StepPlan(expired=(), free=(), prefill=None, decode=False)


def test_an_idle_server_does_nothing():
    assert turn(Slots(2, [])) == NOTHING


def test_a_probe_of_an_idle_server_is_a_step():
    assert turn(Slots(2, []), probe=True) == StepPlan(expired=(), free=(), prefill=None, decode=True)


def test_a_request_is_prefilled_and_decoded_in_one_turn():
    one = request()
    assert turn(Slots(2, []), one) == StepPlan(expired=(), free=(), prefill=one, decode=True)


def test_a_single_token_needs_no_slot_and_no_step():
    slots = Slots(1, [])
    one = request(max_tokens=1)
    assert turn(slots, one) == StepPlan(expired=(), free=(), prefill=one, decode=False)
    seated(slots)
    assert turn(slots, one) == StepPlan(expired=(), free=(), prefill=one, decode=True)


def test_a_request_waits_until_all_its_slots_are_free():
    slots = Slots(3, [])
    first, wide = seated(slots), request(num_samples=3)
    assert turn(slots, wide).prefill is None
    assert turn(slots, wide, ended=[first]).prefill is wide, "a slot given back in this turn counts"


def test_slots_of_ended_and_overdue_samples_are_given_back_once():
    slots = Slots(4, [])
    both, late, running = seated(slots, deadline=5.0), seated(slots, deadline=5.0), seated(slots, deadline=6.0)
    gone = request().samples[0]  # ended, and never had a slot, or has none any more
    decided = turn(slots, ended=[both, gone, both], now=5.0)
    assert set(decided.free) == {both, late}
    assert len(decided.free) == 2
    assert set(decided.expired) == {both.request, late.request}
    assert decided.decode, running


def test_the_last_that_ends_leaves_no_step():
    slots = Slots(1, [])
    only = seated(slots)
    assert turn(slots, ended=[only]) == StepPlan(expired=(), free=(only,), prefill=None, decode=False)


def test_samples_of_one_request_expire_together():
    slots, wide = Slots(2, []), request(num_samples=2, deadline=1.0)
    for sample in wide.samples:
        slots.give(sample)
    decided = turn(slots, now=1.0)
    assert decided.expired == (wide,)
    assert decided.free == tuple(wide.samples)


def test_planning_changes_nothing():
    slots, one = Slots(2, []), request()
    seated(slots, deadline=1.0)
    assert turn(slots, one, now=2.0) == turn(slots, one, now=2.0)
    assert (slots.in_use, slots.free) == (1, 1)
