"""Who waits, who goes first, who is refused."""

import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.errors import QueueFullError, UnavailableError
from slipstream.server.request.options import MAX_PRIORITY
from slipstream.server.request.request import Request
from slipstream.server.scheduler import queue
from slipstream.server.scheduler.queue import RETRY_S, RequestQueue
from slipstream.server.scheduler.turns import AGEING_S


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is told: [s]."""
    now = [1000.0]
    monkeypatch.setattr(queue.time, "monotonic", lambda: now[0])
    return now


def request(priority=0, *, length=1, **more):
    return Request(prompt_ids=[65] * length, max_tokens=3, deliver=print, priority=priority, **more)


def take_first(waiting):
    for request in waiting.first(1):
        assert waiting.take(request)
        return request
    return None


def drained(waiting):
    taken = []
    while (request := take_first(waiting)) is not None:
        taken.append(request)
    return taken


def test_first_come_first_served_within_a_priority(clock):
    waiting, requests = RequestQueue(9), [request() for _ in range(5)]
    for one in requests:
        waiting.put(one)
    assert drained(waiting) == requests


def test_higher_priority_first(clock):
    waiting, low, high, low_too = RequestQueue(9), request(-1), request(3), request(-1)
    for one in (low, high, low_too):
        waiting.put(one)
    assert drained(waiting) == [high, low, low_too]


def test_waiting_is_worth_a_level_each_ageing_s(clock):
    waiting, old = RequestQueue(9), request(0)
    waiting.put(old)
    clock[0] += AGEING_S - 0.1
    almost = request(1)
    waiting.put(almost)
    clock[0] += 0.2
    late = request(1)
    waiting.put(late)
    assert drained(waiting) == [almost, old, late]


def test_nobody_starves(clock):
    """A request of the lowest priority against a stream of the highest: it is served once it has waited long enough."""
    waiting, poor = RequestQueue(9), request(-MAX_PRIORITY)
    waiting.put(poor)
    for second in itertools.count(1):
        clock[0] += 1
        waiting.put(request(MAX_PRIORITY))
        if take_first(waiting) is poor:
            break
        assert second <= 2 * MAX_PRIORITY * AGEING_S


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(-MAX_PRIORITY, MAX_PRIORITY), st.integers(1, 4)), max_size=12))
def test_any_order_of_arrival_is_served_by_priority_then_age(arrivals):
    waiting = RequestQueue(99)
    requests = [request(priority, length=length) for priority, length in arrivals]
    for one in requests:
        waiting.put(one)
    assert waiting.tokens == sum(length for _, length in arrivals)
    assert drained(waiting) == sorted(requests, key=lambda one: -one.priority)  # stable: by age within a priority
    assert waiting.tokens == 0


def test_too_many_requests_are_refused_with_both_numbers():
    waiting = RequestQueue(2)
    for _ in range(2):
        waiting.put(request())
    with pytest.raises(QueueFullError, match="2 requests wait already and max_queued=2"):
        waiting.put(request())
    assert len(waiting) == 2


def test_room_can_be_asked_for_before_there_is_a_request():
    waiting = RequestQueue(1)
    waiting.check_room()
    waiting.put(request())
    with pytest.raises(QueueFullError, match="max_queued=1"):
        waiting.check_room()
    take_first(waiting)
    waiting.close(UnavailableError("closed"))
    with pytest.raises(UnavailableError, match="closed"):
        waiting.check_room()


def test_too_many_tokens_are_refused_with_all_numbers():
    waiting = RequestQueue(9, max_queued_tokens=10)
    waiting.put(request(length=6))
    waiting.put(request(length=4))
    with pytest.raises(QueueFullError, match="prompts of 10 tokens wait already, 1 more exceed max_queued_tokens=10"):
        waiting.put(request(length=1))
    take_first(waiting)
    waiting.put(request(length=6))


def test_a_prompt_beyond_the_token_limit_is_let_into_an_empty_queue():
    waiting = RequestQueue(9, max_queued_tokens=10)
    waiting.put(request(length=11))
    with pytest.raises(QueueFullError):
        waiting.put(request(length=1))


def test_several_wait_together_or_not_at_all(clock):
    waiting = RequestQueue(3, max_queued_tokens=10)
    first, *more = [request(length=3) for _ in range(4)]
    waiting.put(first)
    with pytest.raises(QueueFullError, match="1 requests wait already, 3 more exceed max_queued=3"):
        waiting.put(*more)
    with pytest.raises(QueueFullError, match="prompts of 3 tokens wait already, 8 more exceed max_queued_tokens=10"):
        waiting.put(request(length=4), request(length=4))
    with pytest.raises(RefusedError, match="4 prompts at once exceed max_queued=3"):
        waiting.put(request(), request(), request(), request())
    with pytest.raises(RefusedError, match="2 prompts of 12 tokens at once exceed max_queued_tokens=10"):
        waiting.put(request(length=6), request(length=6))
    assert (len(waiting), waiting.tokens) == (1, 3)
    waiting.put(*more[:2])
    assert drained(waiting) == [first, *more[:2]]


def test_those_whom_free_slots_will_take_do_not_count():
    free = 2
    waiting = RequestQueue(4, slots=2, free_slots=lambda: free)
    for _ in range(6):
        waiting.put(request())
    with pytest.raises(QueueFullError, match="6 requests wait already and max_queued=4 beyond 2 free slots") as refused:
        waiting.put(request())
    assert refused.value.retry_after_s > 0
    with pytest.raises(QueueFullError, match="max_queued=4 beyond 2 free slots"):
        waiting.check_room()
    take_first(waiting)
    free = 1
    with pytest.raises(QueueFullError, match="5 requests wait already and max_queued=4 beyond 1 free slots"):
        waiting.put(request())
    take_first(waiting)
    free = 0
    with pytest.raises(QueueFullError, match="4 requests wait already and max_queued=4;"):
        waiting.put(request())


def test_a_request_counts_against_as_many_free_slots_as_it_needs():
    """Three slots take one of two samples and one single answer; the next of two samples has to wait, and all behind
    it. A single token needs no slot, but counts: nothing else would bound those that ask for one."""
    waiting = RequestQueue(1, slots=3, free_slots=lambda: 3)
    waiting.put(request(num_samples=2), request())
    waiting.put(request(num_samples=2))
    with pytest.raises(QueueFullError, match="3 requests wait already and max_queued=1 beyond 3 free slots"):
        waiting.put(request())
    single = Request(prompt_ids=[1], max_tokens=1, deliver=print)
    waiting = RequestQueue(1, slots=3, free_slots=lambda: 0)
    waiting.put(single)
    with pytest.raises(QueueFullError):
        waiting.check_room()


def test_nobody_starts_before_one_who_needs_more_than_is_free():
    waiting = RequestQueue(1, slots=3, free_slots=lambda: 2)
    waiting.put(request(num_samples=3))
    with pytest.raises(QueueFullError, match="1 requests wait already and max_queued=1 beyond 2 free slots"):
        waiting.put(request())


def test_a_batch_that_not_even_free_slots_admit_is_refused_for_good():
    free = 0
    waiting = RequestQueue(4, slots=2, free_slots=lambda: free)
    with pytest.raises(RefusedError, match="7 prompts at once exceed max_queued=4 beyond 2 free slots"):
        waiting.put(*(request() for _ in range(7)))
    six = [request() for _ in range(6)]
    with pytest.raises(QueueFullError, match="0 requests wait already, 6 more exceed max_queued=4;"):
        waiting.put(*six)
    free = 2
    waiting.put(*six)
    assert drained(waiting) == six


def test_the_retry_hint_follows_the_pace(clock):
    waiting = RequestQueue(1)
    waiting.put(request())
    hints = [hint(waiting)]
    for _ in range(40):
        clock[0] += 0.5
        take_first(waiting)
        waiting.put(request())
    hints.append(hint(waiting))
    clock[0] += 1000
    hints.append(hint(waiting))
    assert hints[:2] == [1.0, pytest.approx(0.5, rel=0.05)]
    assert hints[2] == RETRY_S[1], "nothing moves any more"


def hint(waiting):
    with pytest.raises(QueueFullError) as refused:
        waiting.put(request())
    return refused.value.retry_after_s


def test_a_request_that_left_is_not_taken():
    waiting, gone, next_one = RequestQueue(9), request(), request()
    waiting.put(gone)
    waiting.put(next_one)
    assert waiting.first(1) == [gone]
    assert waiting.remove(gone)
    assert not waiting.take(gone)
    assert waiting.first(1) == [next_one]
    assert waiting.take(next_one)
    assert not waiting.take(next_one)


def test_overdue_requests_are_never_taken(clock):
    waiting, late, good = RequestQueue(9), request(9, deadline=1001.0), request()
    waiting.put(late)
    waiting.put(good)
    clock[0] = 1001.0
    assert take_first(waiting) is good
    assert take_first(waiting) is None
    assert waiting.overdue() == [late]
    assert len(waiting) == 0


def test_overdue_wakes_for_the_nearest_deadline_also_of_one_that_comes_later():
    waiting, found = RequestQueue(9), []
    far, near = request(deadline=time.monotonic() + 60), request(deadline=time.monotonic() + 0.2)
    waiting.put(far)
    thread = threading.Thread(target=lambda: found.append((waiting.overdue(), time.monotonic())))
    thread.start()
    time.sleep(0.05)
    waiting.put(near)
    thread.join(10)
    assert found[0][0] == [near]
    assert near.deadline is not None
    assert near.deadline <= found[0][1] < near.deadline + 5


def test_closed_it_refuses_and_still_gives_out():
    waiting, one = RequestQueue(9), request()
    waiting.put(one)
    waiting.close(UnavailableError("first"))
    waiting.close(UnavailableError("second"))
    with pytest.raises(UnavailableError, match="first"):
        waiting.put(request())
    assert waiting.clear() == [one]
    assert waiting.overdue() == []
    assert waiting.tokens == 0


def names(requests):
    return [request.id for request in requests]


def asks(client, count, **more):
    return [request(client=client, id=f"{client}{number}", **more) for number in range(count)]


def test_clients_take_turns(clock):
    """One who comes anew waits for one turn of whoever has many waiting, however many these are."""
    waiting = RequestQueue(99)
    waiting.put(*asks("a", 50))
    clock[0] += 1
    waiting.put(*asks("b", 3))
    clock[0] += 1
    waiting.put(*asks("c", 1))
    foreseen = names(waiting.first(9))
    taken = []
    for _ in range(9):
        clock[0] += 1
        taken.append(take_first(waiting))
    assert names(taken) == foreseen == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3", "a4"]


def test_turns_are_fair_at_one_and_the_same_moment(clock):
    waiting = RequestQueue(99)
    waiting.put(*asks("a", 3))
    waiting.put(*asks("b", 2))
    assert names(waiting.first(5)) == names(drained(waiting)) == ["a0", "b0", "a1", "b1", "a2"]


def test_a_slow_server_gives_a_new_caller_its_turn_as_soon(clock):
    waiting = RequestQueue(999)
    waiting.put(*asks("a", 500))
    for _ in range(20):
        clock[0] += 60
        take_first(waiting)
    waiting.put(*asks("b", 1))
    assert "b0" in names(waiting.first(2))


def test_priority_still_goes_before_turns(clock):
    waiting = RequestQueue(99)
    waiting.put(*asks("a", 2, priority=1))
    waiting.put(*asks("b", 2))
    assert names(drained(waiting)) == ["a0", "a1", "b0", "b1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-MAX_PRIORITY, MAX_PRIORITY)), max_size=30))
def test_everybody_is_served_once_and_nothing_is_kept(arrivals):
    waiting = RequestQueue(99)
    for number, (client, priority) in enumerate(arrivals):
        waiting.put(request(priority, client=client, id=str(number)))
    assert sorted(names(drained(waiting)), key=int) == [str(number) for number in range(len(arrivals))]
    assert waiting.tokens == len(waiting) == 0
    assert not waiting._turn
    assert not waiting._count_of


def test_nobody_fills_the_queue_against_the_others(clock):
    waiting = RequestQueue(4, 8)
    waiting.put(*asks("a", 4))
    with pytest.raises(QueueFullError):
        waiting.check_room("a")
    for client in "bcde":
        waiting.check_room(client)
        waiting.put(*asks(client, 1))
        with pytest.raises(QueueFullError):
            waiting.put(*asks(client, 1))
    with pytest.raises(QueueFullError):
        waiting.check_room("f")


def test_nobody_fills_the_tokens_against_the_others(clock):
    waiting = RequestQueue(9, 8)
    waiting.put(request(client="a", length=8))
    with pytest.raises(QueueFullError):
        waiting.put(request(client="a"))
    waiting.put(request(client="b", length=8))
    with pytest.raises(QueueFullError):
        waiting.put(request(client="c"))
