"""Functions that strangers' input may hold up, run in processes of their own: bounded in time and memory.

What happens there stops nobody here: not a loop without end, not a library that keeps the interpreter or aborts the
process, not a text that grows beyond all memory.
"""

import atexit
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import Any, TypeVar

T = TypeVar("T")

PROGRAM = "slipstream.engine_impl.runtime.worker"
"""What a worker runs; it imports a function's module when that is first called."""
READY = b"ready"
"""A worker's first word."""
START_S = 60.0
"""How long a worker may take to start (seconds)."""
GRACE_S = 5.0
"""After its time is up a worker ends by itself so much later (seconds), should nobody be left to end it."""


class WorkerError(Exception):
    """A call that came to no end. The message tells which limit it met, in words that fit behind "it"."""


class Workers:
    """A few processes. call() them from any thread; they are started when they are needed, and end with this one."""

    def __init__(self, count: int, *, seconds: float, memory_mib: int, wait_s: float = 30.0, nice: int = 0) -> None:
        """
        Args:
            count: processes at most.
            seconds: how long a call may take.
            memory_mib: what a call may take on top of what the worker has (MiB).
            wait_s: how long a call waits for a worker that is free.
            nice: how far the workers stand back when processors are short.
        """
        self._seconds, self._memory_mib, self._wait_s, self._nice = seconds, memory_mib, wait_s, nice
        self._free = threading.Semaphore(count)
        self._idle: list[_Worker] = []
        _ALL.add(self)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """What the function returns. It must be one that can be imported, and its arguments and result be pickled.

        Raises what it raises, if that can be pickled, and WorkerError when a limit is met or the worker dies.
        """
        with self._worker() as worker:
            return worker.call(function, args, self._seconds)

    def close(self) -> None:
        """Ends those that are idle."""
        while self._idle:
            self._idle.pop().end()

    @contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        if not self._free.acquire(timeout=self._wait_s):
            raise WorkerError(f"waited {self._wait_s:g} s for others of its kind")
        try:
            worker = self._idle.pop() if self._idle else _Worker(self._memory_mib, self._nice)
            try:
                yield worker
            finally:
                if worker.is_alive:
                    self._idle.append(worker)
        finally:
            self._free.release()


class _Worker:
    """One process, and the way to it."""

    def __init__(self, memory_mib: int, nice: int) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno()), str(memory_mib), str(nice)]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what libraries say of strangers' input is no news
                start_new_session=True,  # Ctrl-C is not for it
            )
        self.is_alive, self._is_ready = True, False

    def call(self, function: Callable[..., T], args: tuple[Any, ...], seconds: float) -> T:
        """Raises as Workers.call() does."""
        goes_on = False
        try:
            self._await_start()
            self._connection.send_bytes(pickle.dumps((seconds, function, args), pickle.HIGHEST_PROTOCOL))
            if not self._connection.poll(seconds):
                raise WorkerError(f"takes longer than {seconds:g} s")
            kind, value, goes_on = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerError(self._last_words()) from error
        finally:
            if not goes_on:
                self.end()
        if kind == "raised":
            raise value
        return value

    def _await_start(self) -> None:
        if self._is_ready:
            return
        if not self._connection.poll(START_S):
            raise WorkerError(f"takes longer than {START_S:g} s to start")
        assert self._connection.recv_bytes() == READY
        self._is_ready = True

    def end(self) -> None:
        """Kills it, if it has not ended."""
        self.is_alive = False
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            number = self._process.wait(GRACE_S)
            if number == -signal.SIGALRM:
                return "takes too long"
            if number < 0:
                return f"ends its process ({signal.Signals(-number).name})"
        return "ends its process"


_ALL: "weakref.WeakSet[Workers]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for workers in list(_ALL):
        workers.close()
