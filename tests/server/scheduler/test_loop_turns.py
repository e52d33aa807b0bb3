"""Turns that are run one by one, without the loop's thread: what happens between two lines of it."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from slipstream.server.errors import FailedError
from slipstream.server.request.events import FinishReason
from slipstream.server.scheduler.loop import Loop
from slipstream.server.scheduler.prompt import Prompt
from slipstream.server.scheduler.queue import RequestQueue

from tests.server.scheduler.loop import Asked, until
from tests.server.scheduler.reading import FREE, expected, reading


class House:
    """A loop whose turns the test runs."""

    def __init__(self, slots=4, queue=None, **sizes):
        self.queue = RequestQueue(99) if queue is None else queue
        self.engine: Any = reading(slots, **sizes)
        self.loop = Loop(self.engine, None, self.queue, None)
        self.loop.start(warm_up=False)
        self.loop.delivery.start()

    def ask(self, *args, **more):
        request = Asked(*args, sampling=FREE, **more)
        self.queue.put(request)
        return request

    def turns(self, count=1):
        for _ in range(count):
            self.loop._turn()

    def idle(self):
        for _ in range(200):
            if not len(self.queue) and not self.loop._has_work():
                return
            self.turns()
        raise AssertionError("it stands still")


@pytest.fixture
def young():
    """What is made during the test stays in the garbage collector's first generation: it alone is looked through."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("is_taken", [True, False])
def test_nothing_is_kept_of_a_request_that_is_over(is_taken):
    house = House(1)
    other = house.ask("x", 9)
    request = house.ask("some text", 3)
    house.turns(3)
    if not is_taken:
        house.queue.remove(request)
        house.loop.delivery.end(request, FinishReason.CANCELLED)
    house.idle()
    assert other.all()[-1].is_last
    assert request.all()[-1].is_last
    last = house.ask("y", 3)  # the threads hold what they have had last
    house.idle()
    last.all()
    gone, request = weakref.ref(request), None
    until(lambda: gc.collect(0) >= 0 and gone() is None)


def test_a_request_that_is_cancelled_as_it_is_taken_is_no_longer_live():
    class Cancelling(RequestQueue):
        def take(self, request):
            is_taken = super().take(request)
            house.loop.ended.extend(request.samples)
            house.loop.delivery.end(request, FinishReason.CANCELLED)
            until(lambda: request.done)
            return is_taken

    house = House(queue=Cancelling(9))
    request = house.ask("text", 3)
    house.idle()
    assert request.all()[-1].finish_reason is FinishReason.CANCELLED
    assert house.loop.live == set()
    assert house.loop.slots_in_use == 0


def test_requests_may_end_while_a_failed_step_is_cleared_away():
    house = House()
    first, second = house.ask("a", 9), house.ask("b", 9)
    house.turns(3)
    parked = house.loop._holdings.parked
    holds_all = parked.holds_all

    def ends_the_other(request):
        house.loop.live.discard(second if request is first else first)
        return holds_all(request)

    parked.holds_all = ends_the_other
    parked.waiting.extend(Prompt(tuple(request.samples), np.arange(4), []) for request in (first, second))
    house.loop._recovery.recover(RuntimeError("broke"), house.loop.live)
    assert len(house.loop.live) <= 1


def test_a_failure_while_room_is_given_leaves_nobody_with_a_slot():
    house = House(2)

    def let_in(prompt, slots):
        raise RuntimeError("no page")

    house.loop._holdings.room.let_in = let_in
    request = house.ask("a", 9)
    with pytest.raises(RuntimeError, match="no page") as raised:
        house.turns()
    house.loop._recovery.recover(raised.value, house.loop.live)
    assert isinstance(request.all()[-1].error, FailedError)
    good = house.ask("b", 20)
    house.idle()
    assert good.answer()[0] == expected("b", 20)
    assert house.loop._holdings.slots.free == 2


def test_growing_slots_may_take_the_cached_prefix_that_a_plan_counted_on():
    """Of 23 tokens, 12 cached, three samples share 5 pages of 6; if 8 are cached, 4 of them: two pages more."""
    house, prefix = House(4, pages=11), "twelve of it"
    house.ask(prefix + "!", 1)
    house.idle()
    house.ask("seven pages of another text.", 1)
    house.idle()
    assert house.loop.pages() == {"free": 1, "live": 0, "cached": 10}
    old = house.ask("old", 12)
    house.turns()
    young = house.ask(prefix + " and eleven", 2, num_samples=3)
    house.turns()
    house.idle()
    assert old.answer()[0] == expected("old", 12)
    assert young.all()[-1].error is None


def test_several_prompts_are_prefilled_before_a_step():
    """Pieces of a turn have eight tokens together, padding included; where no more wait, there is one."""
    house = House(slots=6, prefill_lengths=(2, 4))
    running = house.ask("a", 30)
    house.turns(2)
    before = len(house.engine.log)
    texts = ("bcd", "b", "efgh", "e", "ijkl")
    others = [house.ask(text, 3) for text in texts]
    house.turns(3)
    calls = [call.partition(" ")[0] for call in house.engine.log[before:]]
    assert calls == [*[*["prefill", "insert"] * 2, "generate"] * 2, "prefill", "insert", "generate"]
    house.idle()
    assert running.answer()[0] == expected("a", 30)
    assert [request.answer()[0] for request in others] == [expected(text, 3) for text in texts]


def test_of_the_prompts_of_a_turn_one_fails_alone():
    house = House(prefill_lengths=(2,))

    def on_call(call):
        if call == "prefill b":
            raise RuntimeError(call)

    house.engine.on_call = on_call
    good, bad, behind = house.ask("a", 3), house.ask("b", 3), house.ask("c", 3)
    house.idle()
    assert isinstance(bad.all()[-1].error, FailedError)
    assert good.answer()[0] == expected("a", 3)
    assert behind.answer()[0] == expected("c", 3)
    assert house.loop.pages()["live"] == 0


def test_a_step_carries_the_only_piece_of_a_turn_along():
    house = House(prefill_lengths=(2,), carries_pieces=True)
    house.ask("a", 30)
    house.turns(2)
    before = len(house.engine.log)
    house.ask("b", 3)
    house.ask("c", 3)
    house.turns(2)
    calls = [call.partition(" ")[0] for call in house.engine.log[before:]]
    assert calls == ["prefill", "generate", "insert"] * 2
    house.idle()


def test_where_nobody_decodes_the_last_piece_of_a_turn_is_carried():
    house = House(slots=5, prefill_lengths=(2,), carries_pieces=True)
    requests = [house.ask(text, 3) for text in "abcde"]
    house.turns(1)
    calls = [call.partition(" ")[0] for call in house.engine.log]
    assert calls == [*["prefill", "insert"] * 3, "prefill", "generate", "insert"]
    house.idle()
    assert [request.answer()[0] for request in requests] == [expected(text, 3) for text in "abcde"]
