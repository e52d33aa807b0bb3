"""What a server does as a process: its end, its stdout, and work in threads that do not hold it."""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any


def leave_at_once(status: int) -> None:
    """Ends the process: what still runs, on whatever device, is not waited for."""
    logging.shutdown()
    os._exit(status)


def say(text: str) -> None:
    """A line on stdout, if anybody reads it: in one piece, as the log may go to the same place."""
    try:
        print(f"{text}\n", end="", flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # or Python complains again at its end


async def first_of(*events: asyncio.Event) -> None:
    """Waits until one of them is set."""
    waiters = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()


async def in_thread(function: Callable[[], Any]) -> Any:
    """Its result. A daemon thread, unlike asyncio's: a signal may end the process while it still works."""
    future, loop = asyncio.get_running_loop().create_future(), asyncio.get_running_loop()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def work() -> None:
        try:
            outcome = (future.set_result, function())
        except BaseException as error:
            outcome = (future.set_exception, error)
        loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await future
