"""The table of slots, and the rosters that steps in flight keep."""

import numpy as np
import pytest
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.delivery.result import HostResult, PendingResult
from slipstream.server.request.request import Request
from slipstream.server.scheduler.slots import Slots

from tests.fakes import FakeEngine


def sample(**more):
    return Request(**{"prompt_ids": [1], "max_tokens": 3, "deliver": print} | more).samples[0]


def table(slots, stop_ids=(), **more):
    return Slots(slots, stop_ids, **{"cache_length": 64} | more)


def give(slots, one):
    slot = slots.reserve(one)
    slots.seat(one, np.array(one.request.prompt_ids))
    return slot


def read(slots, roster, *tokens_of_slots, is_step=True, width=1):
    """A result with these tokens of each row, as many as there are, of a step of that width at least."""
    count_B = np.array([len(tokens) for tokens in tokens_of_slots])
    token_BW = np.full((len(tokens_of_slots), max(width, count_B.max())), -1)
    for row, tokens in enumerate(tokens_of_slots):
        token_BW[row, : len(tokens)] = tokens
    nothing = [None] * 8
    result = HostResult(roster, token_BW, count_B, *roster.ends(token_BW, count_B), *nothing)
    return slots.read(result, counted=result.width if is_step else 0)


def test_slots_are_given_and_taken_back():
    slots, first, second = table(2, [7]), sample(), sample()
    assert sorted([give(slots, first), give(slots, second)]) == [0, 1]
    assert (slots.in_use, slots.free) == (2, 0)
    slot = first.slot
    assert slots.take_back(first) == slot
    assert first.slot is None
    assert (slots.in_use, slots.free) == (1, 1)
    assert give(slots, sample()) == slot


def test_a_roster_in_flight_keeps_its_owners():
    slots, old, new = table(1, [7]), sample(), sample(sampling=SamplingParams(stop_token_ids=(9,)))
    give(slots, old)
    in_flight = slots.roster
    slots.take_back(old)
    give(slots, new)
    assert in_flight.seats == [(0, old)]
    assert slots.roster.seats == [(0, new)]
    assert not in_flight.ends(np.array([[9]]), np.array([1]))[1].any()
    assert slots.roster.ends(np.array([[9]]), np.array([1]))[1].all()


@pytest.mark.parametrize(
    ("asked", "stopping"),
    [
        ({}, {7, 8}),
        ({"stop_token_ids": (3, 4)}, {3, 4, 7, 8}),
        ({"ignore_eos": True}, set()),
        ({"ignore_eos": True, "stop_token_ids": (3, 7)}, {3, 7}),
        ({"stop_token_ids": tuple(range(20, 36))}, {*range(20, 36), 7, 8}),
    ],
)
def test_stop_ids_are_the_models_and_the_requests(asked, stopping):
    slots = table(3, [7, 8])
    one = sample(sampling=SamplingParams(**asked))
    slot = give(slots, one)
    for roster, at in ((slots.roster, slot), (slots.of([one]), 0)):
        for token in range(-2, 40):
            token_BW = np.full((len(roster.owner_B), 1), token if token >= 0 else -1)
            _, stopped_B = roster.ends(token_BW, np.ones(len(roster.owner_B), int))
            assert stopped_B[at] == (token in stopping)
            assert stopped_B.sum() == stopped_B[at], "an empty slot never stops"


def test_steps_are_counted_to_max_tokens():
    slots, short, long = table(3, []), sample(max_tokens=2), sample(max_tokens=3)
    give(slots, short)
    give(slots, long)
    assert slots.count_step(slots.live, 1) == [short]
    slots.take_back(short)
    assert slots.count_step(slots.live, 1) == [long]
    slots.take_back(long)
    assert slots.count_step(slots.live, 1) == []


@pytest.mark.parametrize(
    ("tokens", "count", "kept", "stopped"),
    [
        ([1, 2, 3], 3, 3, False),
        ([1, 7, 3], 3, 1, True),
        ([7, 7, 7], 3, 0, True),
        ([1, 2, 7], 2, 2, False),  # the stop token is none of the valid ones
        ([1, 2, 7], 3, 2, True),
        ([7, 7, 7], 0, 0, False),
    ],
)
def test_several_tokens_of_a_step_are_kept_up_to_the_first_stop_token(tokens, count, kept, stopped):
    slots = table(1, [7])
    give(slots, sample())
    kept_B, stopped_B = slots.roster.ends(np.array([tokens]), np.array([count]))
    assert (kept_B.tolist(), stopped_B.tolist()) == ([kept], [stopped])


def test_tokens_left_are_an_upper_bound_until_a_step_is_read():
    slots, one = table(2, []), sample(max_tokens=8)
    give(slots, one)
    for _ in range(3):
        assert slots.count_step(slots.live, 3) == []  # 7 left, less one at least for each
    assert read(slots, slots.live, [5, 6], width=3) == []  # 3 left
    assert read(slots, slots.live, [5, 6, 7]) == []  # 1 left
    assert slots.count_step(slots.live, 3) == [one], "the fourth step brings the last token at least"


def test_a_step_that_brings_more_than_was_left_ends_an_answer_when_it_is_read():
    slots, one = table(1, []), sample(max_tokens=4)
    give(slots, one)
    assert slots.count_step(slots.live, 4) == []
    assert read(slots, slots.live, [1, 2, 3, 4]) == [one]


def test_a_step_of_an_earlier_owner_settles_nothing():
    slots, old, new = table(1, []), sample(max_tokens=9), sample(max_tokens=3)
    give(slots, old)
    in_flight = slots.live
    slots.count_step(slots.live, 4)
    slots.take_back(old)
    give(slots, new)
    assert read(slots, in_flight, [1, 2, 3, 4]) == []
    assert slots.text(new).tolist() == [1]
    assert slots.count_step(slots.live, 4) == []
    assert slots.count_step(slots.live, 4) == [new]


def test_whose_deadline_has_passed():
    slots, soon, later, never = table(3, []), sample(deadline=5.0), sample(deadline=6.0), sample()
    for one in (soon, later, never):
        give(slots, one)
    assert slots.overdue(4.9) == []
    assert slots.overdue(5.0) == [soon]
    slots.take_back(soon)
    assert slots.overdue(99.0) == [later]


@pytest.mark.parametrize(
    ("logprobs", "copied"), [((None, None), 2), ((None, 0), 3), ((0, 3), 5)], ids=["nobody", "chosen", "top"]
)
def test_only_what_somebody_asked_for_is_copied_from_the_device(logprobs, copied):
    engine, slots, copies = FakeEngine(), table(2, []), []
    engine.on_call = copies.append
    for asked in logprobs:
        give(slots, sample(sampling=SamplingParams(logprobs=asked)))
    result = PendingResult(engine._result(np.array([[1], [2]])), slots.roster, is_step=True, started=0.0).read()
    assert result is not None
    assert copies == ["copy"] * copied
    assert (result.logprob_BW is None, result.top_token_BWP is None) == (copied < 3, copied < 5)


def test_a_text_is_its_prompt_and_what_was_read():
    slots, first, second = table(3, []), sample(prompt_ids=[5, 6], max_tokens=9), sample()
    give(slots, first)
    give(slots, second)
    assert read(slots, slots.of([second, None, first]), [2], [], [7], is_step=False) == []
    assert [slots.text(one).tolist() for one in (first, second)] == [[5, 6, 7], [1, 2]]
    read(slots, slots.live, [8, 9], [3])
    assert [slots.text(one).tolist() for one in (first, second)] == [[5, 6, 7, 8, 9], [1, 2, 3]]
    slots.take_back(second)
    read(slots, slots.live, [10])
    assert slots.text(first).tolist() == [5, 6, 7, 8, 9, 10]


def test_rows_are_counted_as_the_most_that_steps_in_flight_may_bring():
    slots, one, other = table(2, [], cache_length=12), sample(max_tokens=11), sample(max_tokens=11)
    assert slots.rows_wanted(4).tolist() == []
    give(slots, one)
    assert slots.rows_wanted(4).tolist() == [1 + 4]
    slots.count_step(slots.live, 4)
    give(slots, other)
    assert slots.rows_wanted(4).tolist() == [1 + 4 + 4, 1 + 4]
    slots.count_step(slots.live, 4)
    assert slots.rows_wanted(4).tolist() == [12, 1 + 4 + 4], "no more than the longest text"
    read(slots, slots.live.of(np.array([0])), [1], width=4)
    assert slots.rows_wanted(4).tolist() == [1 + 1 + 4 + 4, 1 + 4 + 4]


def test_a_reserved_slot_does_not_decode():
    slots, one = table(2, []), sample()
    slots.reserve(one)
    assert (slots.in_use, slots.free, slots.live.taken) == (1, 1, 0)
    assert slots.count_step(slots.live, 1) == []
    slots.seat(one, np.array([1]))
    assert slots.live.seats == [(0, one)]
    assert slots.live.slot_B.tolist() == [one.slot]


def test_who_goes_on_has_less_left():
    """As after a pre-emption: two of four tokens are there, one is on its way."""
    slots, one = table(1, []), sample(max_tokens=4)
    slots.reserve(one)
    slots.seat(one, np.array([1, 2, 3]))
    assert slots.count_step(slots.live, 1) == [one]
