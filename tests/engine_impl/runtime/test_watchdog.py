"""Work that does not end is noticed, and nothing else is."""

import threading

from slipstream.engine_impl.runtime.watchdog import Watchdog

WAIT_S = 10.0


def test_work_that_takes_too_long_is_told_once_while_it_goes_on():
    told, called = [], threading.Event()
    dog = Watchdog(0.05, lambda reason: told.append(reason) or called.set())
    with dog.working("a step"):
        assert called.wait(WAIT_S)
    assert told == ["a step has taken longer than --step-timeout=0.05 s"]


def test_idleness_is_no_work():
    told = threading.Event()
    dog = Watchdog(0.05, lambda reason: told.set())
    for _ in range(5):
        with dog.working("a step"):
            pass
    assert not told.wait(0.2)
    dog.close()


def test_a_timeout_of_0_watches_nothing():
    before = threading.active_count()
    with Watchdog(0, lambda reason: None).working("a step"):
        assert threading.active_count() == before


def test_one_that_is_closed_tells_nothing():
    told = threading.Event()
    dog = Watchdog(0.05, lambda reason: told.set())
    dog.close()
    with dog.working("a step"):
        assert not told.wait(0.2)
