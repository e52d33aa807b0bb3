"""Prompts that devices of their own compute: steps go on meanwhile, and nothing is stored before it is there."""

from slipstream.server.request.events import FinishReason

from tests.server.scheduler.reading import expected
from tests.server.scheduler.test_loop_turns import House


class Apart(House):
    """Prefixes are ready when the test says so."""

    def __init__(self, slots=4, **sizes):
        super().__init__(slots, prefills_apart=True, **sizes)
        self.ready = True
        self.engine.is_prefix_ready = lambda: self.ready

    def calls(self, turns):
        """What the engine was asked for in so many turns, without the texts."""
        before = len(self.engine.log)
        self.turns(turns)
        return [call.partition(" ")[0] for call in self.engine.log[before:]]


def test_steps_go_on_while_a_prompt_is_computed():
    house = Apart()
    one = house.ask("a", 30)
    house.turns(2)
    house.ready = False
    other = house.ask("a prompt of two pieces", 3)
    assert house.calls(5) == ["prefill", *["generate"] * 5]
    house.ready = True
    assert house.calls(1) == ["insert", "prefill", "generate"]
    house.idle()
    assert one.answer()[0] == expected("a", 30)
    assert other.answer()[0] == expected("a prompt of two pieces", 3)


def test_where_nobody_decodes_it_is_waited_for():
    house = Apart()
    house.ready = False
    request = house.ask("a", 3)
    house.turns(2)
    assert "insert 0" in house.engine.log or "insert 3" in house.engine.log
    house.idle()
    assert request.answer()[0] == expected("a", 3)


def test_others_wait_until_the_devices_are_free():
    house = Apart()
    house.ask("a", 30)
    house.turns(2)
    house.ready = False
    house.ask("b", 3)
    house.ask("c", 3)
    assert house.calls(4).count("prefill") == 1
    house.ready = True
    assert house.calls(2).count("prefill") == 1
    house.idle()


def test_one_that_ends_meanwhile_is_freed_once_it_is_stored():
    house = Apart(slots=2)
    running = house.ask("a", 40)
    house.turns(2)
    house.ready = False
    gone = house.ask("b", 9)
    house.turns(2)
    house.loop.delivery.end(gone, FinishReason.CANCELLED)
    assert gone.all()[-1].is_last
    house.turns(2)
    assert house.loop.slots_in_use == 2
    house.ready = True
    house.turns(2)
    assert house.loop.slots_in_use == 1
    house.idle()
    assert running.answer()[0] == expected("a", 40)
    assert house.loop.pages()["live"] == 0


def test_a_failed_step_forgets_what_is_computed_apart():
    house = Apart()
    running = house.ask("a", 40)
    house.turns(2)
    house.ready = False
    waiting = house.ask("b", 3)
    house.turns(1)
    house.loop._recovery.recover(RuntimeError("the step broke"), house.loop.live)
    assert running.all()[-1].error is not None
    assert waiting.all()[-1].error is not None
    house.ready = True
    again = house.ask("c", 3)
    house.idle()
    assert again.answer()[0] == expected("c", 3)
    assert house.loop.pages()["live"] == 0
