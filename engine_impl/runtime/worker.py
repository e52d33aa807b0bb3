"""A worker's process: `python -m ...worker FD MEMORY_MIB NICE`. See workers.py."""

import gc
import os
import pickle
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .workers import GRACE_S, READY, WorkerError

KEPT_MIB = 192
"""A call that leaves the process so much larger than it began, libraries included, is its last (MiB)."""
PAGE_MIB = resource.getpagesize() / (1 << 20)


def main(fd: int, memory_mib: int, nice: int) -> None:
    """Until the caller's end is closed."""
    os.nice(nice)
    gc.disable()  # strangers' input is a million small objects: they would be looked through again and again
    began_mib = data_mib()
    with Connection(fd) as caller:
        caller.send_bytes(READY)
        while True:
            try:
                sent = caller.recv_bytes()
            except EOFError:
                return
            bound_memory(data_mib() + memory_mib)
            kind, value = outcome(sent)
            goes_on = data_mib() - began_mib < KEPT_MIB
            caller.send_bytes(packed(kind, value, goes_on))
            if not goes_on:
                return
            del sent, value
            gc.collect()
            gc.freeze()  # what is left is libraries


def outcome(sent: bytes) -> tuple[str, Any]:
    """("returned", what) or ("raised", why)."""
    try:
        seconds, function, args = pickle.loads(sent)
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_S)
        try:
            return "returned", function(*args)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except MemoryError:
        return "raised", WorkerError("takes too much memory")
    except BaseException as error:  # a library's panic is no Exception
        return "raised", error


def packed(kind: str, value: Any, goes_on: bool) -> bytes:
    """For the caller. An exception that cannot be pickled goes as what it says."""
    try:
        reply = pickle.dumps((kind, value, goes_on), pickle.HIGHEST_PROTOCOL)
        if kind == "raised":
            pickle.loads(reply)
            if not isinstance(value, Exception):
                raise TypeError("a panic")
        return reply
    except MemoryError:
        error = WorkerError("takes too much memory")
    except Exception:
        error = WorkerError(f"fails ({type(value).__name__}: {value})"[:500].replace("\n", " "))
    return pickle.dumps(("raised", error, goes_on), pickle.HIGHEST_PROTOCOL)


def data_mib() -> float:
    """What RLIMIT_DATA counts; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * PAGE_MIB
    except (OSError, IndexError):
        return 0.0


def bound_memory(mib: float) -> None:
    """From now on, whatever would exceed it fails (Linux)."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(mib * (1 << 20))
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
