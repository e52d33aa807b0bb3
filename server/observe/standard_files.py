"""The process's stdout and stderr, which hold up no writer: what finds no room in a pipe or on a terminal is dropped.

Python is not the only one who writes there. C++ libraries do, in threads of their own, children do, and the
interpreter does at its end; whoever has stopped to read a pipe would hold up each of them.
"""

import io
import logging
import os
import select
import stat
import sys
import threading
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

OUT, ERR = 1, 2


def take_over() -> None:
    """For the process's whole life. What Python itself tells of (warnings, exceptions that nobody can catch) goes into
    the log from now on, which keeps it until there is room."""
    for number, name in ((OUT, "stdout"), (ERR, "stderr")):
        stream = getattr(sys, name)
        if number_of(stream) == number:  # not where somebody has put another stream in its place
            stop_waiting(number)
            raw = Unwaiting(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, encoding=stream.encoding, errors="replace", write_through=True))
    logging.captureWarnings(True)

    def tell(what: object, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        info: Any = (kind, error, trace)
        log.error("an exception that nobody caught in %r", what, exc_info=info)

    sys.unraisablehook = lambda it: tell(it.object, it.exc_type, it.exc_value, it.exc_traceback)
    threading.excepthook = lambda it: tell(it.thread, it.exc_type, it.exc_value, it.exc_traceback)


def stop_waiting(number: int) -> None:
    """No write to this file descriptor waits from now on, whoever writes, children too: it fails with EAGAIN.

    A pipe or a terminal is opened anew, since others who hold it (a shell, its next command) want theirs to wait. What
    cannot be opened (a socket, a pipe of another user) is changed as it is, but for a terminal.
    """
    if stat.S_ISREG(os.fstat(number).st_mode):
        return
    try:
        own = os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        if not os.isatty(number):
            os.set_blocking(number, False)
        return
    os.dup2(own, number)
    os.close(own)


def await_room(stream: Any) -> None:
    """Waits until somebody has read of what was written, or has gone. A stream of no file has room always."""
    if (number := number_of(stream)) is not None:
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        poll.poll()


def number_of(stream: Any) -> int | None:
    """Its file descriptor, if it has one."""
    with suppress(AttributeError, OSError, ValueError):
        return stream.fileno()
    return None


class Unwaiting(io.FileIO):
    """A file that takes what it has room for; nobody is told of the rest."""

    def write(self, data: Any, /) -> int:
        return super().write(data) or memoryview(data).nbytes
