"""What an event loop complains of is told, at a pace."""

import asyncio
import errno
from types import SimpleNamespace
from typing import Any

from slipstream.server.net import complaints
from slipstream.server.net.complaints import Complaints


def test_no_room_for_connections_is_told_once_a_second_and_what_helps(monkeypatch, caplog):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(complaints, "time", SimpleNamespace(monotonic=lambda: clock.now))
    one, loop = Complaints(), asyncio.new_event_loop()
    full: dict[str, Any] = {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")}
    for clock.now in (100.0, 100.5, 100.99, 101.0):
        one.tell(loop, full)
    loop.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "Too many open files; raise `ulimit -n`" in told[0]


def test_all_else_is_told_each_time_as_the_loop_would():
    told: list[Any] = []
    loop: Any = SimpleNamespace(default_exception_handler=told.append)
    others: list[dict[str, Any]] = [
        {"message": "a task", "exception": ValueError("x")},
        {"message": "a pipe", "exception": OSError(errno.EPIPE, "Broken pipe")},
        {"message": "no exception"},
    ]
    one = Complaints()
    for context in (*others, *others):
        one.tell(loop, context)
    assert told == [*others, *others]
