"""Where a start's time goes, by hand."""

import subprocess
import sys
import time

import pytest
from slipstream.engine_impl.runtime.timeline import COMPILE, TRACE, Timeline, covered, process_start


class Clock:
    """time.monotonic(), set by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def timeline(monkeypatch):
    """Hears what the test reports, and nothing of JAX."""
    timeline = Timeline(began=10.0)
    monkeypatch.setattr(timeline, "_listen", lambda: None)
    return timeline


def report(timeline, clock, event, start, end):
    clock.now = end
    timeline.on_duration(event, end - start, fun_name="f")


def test_stages_add_up_to_the_whole(timeline, clock):
    """Began at 10, loading from 13 to 18, ended at 30. A trace holds a compilation, which counts as that alone."""
    clock.now = 13.0
    with timeline.loading():
        clock.now = 18.0
    report(timeline, clock, TRACE[0], 17.0, 19.0)
    report(timeline, clock, COMPILE, 22.0, 25.0)
    report(timeline, clock, TRACE[1], 20.0, 26.0)
    report(timeline, clock, "/jax/other", 26.0, 29.0)
    clock.now = 30.0
    startup = timeline.startup()
    assert startup.stages == {"imports": 3.0, "loading": 4.0, "tracing": 5.0, "compiling": 3.0, "rest": 5.0}
    assert startup.seconds == 20.0
    assert startup.as_json().items() >= {"imports_s": 3.0, "rest_s": 5.0}.items()


def test_a_start_ends_once(timeline, clock):
    clock.now = 14.0
    first = timeline.startup()
    report(timeline, clock, COMPILE, 15.0, 16.0)
    assert timeline.startup() is first


def test_a_process_that_loads_nothing_imports_all_the_time(timeline, clock):
    clock.now = 14.0
    assert timeline.startup().stages == {
        "imports": 4.0, "loading": 0.0, "tracing": 0.0, "compiling": 0.0, "rest": 0.0,
    }  # fmt: skip


def fail_after_two_seconds(timeline, clock):
    with timeline.loading():
        clock.now = 13.0
        raise OSError("gone")


def test_a_load_that_fails_has_an_end_too(timeline, clock):
    clock.now = 11.0
    with pytest.raises(OSError, match="gone"):
        fail_after_two_seconds(timeline, clock)
    assert timeline.startup().stages["loading"] == 2.0


@pytest.mark.parametrize(
    ("intervals", "total"),
    [
        ([], 0),
        ([(1, 2), (3, 4)], 2),
        ([(1, 4), (2, 3)], 3),  # one within another
        ([(1, 3), (2, 4)], 3),
        ([(-5, 1), (9, 20)], 2),  # cut at both ends
        ([(-5, 20)], 10),
        ([(11, 12)], 0),
    ],
)
def test_time_that_intervals_cover(intervals, total):
    assert covered(intervals, 0, 10) == total


def test_a_process_knows_when_it_began():
    """Between our two looks at the clock, to a tick of a hundredth second; not when the module was imported."""
    code = (
        "import time; time.sleep(0.3)\n"
        "from slipstream.engine_impl.runtime.timeline import process_start; print(process_start())"
    )
    before = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert before - 0.011 <= told <= time.monotonic() - 0.3
    assert process_start() < before
