"""Requests sent one way or the other.

Closed loop: a fixed number of requests is in flight; as one ends the next is sent. Open loop: requests come at a rate,
whether the ones before are answered or not, and their latency counts from when they were due.
"""

import asyncio
import time
from collections.abc import Callable

from .caller import Caller, Record
from .workload import LoadRequest


async def closed(
    caller: Caller, asks: list[LoadRequest], in_flight: int, on_done: Callable[[Record], None]
) -> list[Record]:
    """Records in the order of `asks`."""
    records: dict[int, Record] = {}
    waiting = iter(enumerate(asks))

    async def work() -> None:
        for index, ask in waiting:
            records[index] = record = Record(due=time.perf_counter())
            await caller.call(ask, record)
            on_done(record)

    await asyncio.gather(*(work() for _ in range(in_flight)))
    return [records[index] for index in range(len(asks))]


async def opened(
    caller: Caller, asks: list[LoadRequest], due: list[float], on_done: Callable[[Record], None]
) -> list[Record]:
    """Request i is sent `due[i]` seconds from now. Records in the order of `asks`."""
    start = time.perf_counter()

    async def send(ask: LoadRequest, due: float) -> Record:
        await asyncio.sleep(due - time.perf_counter())
        record = Record(due=due)
        await caller.call(ask, record)
        on_done(record)
        return record

    return await asyncio.gather(*(send(ask, start + at) for ask, at in zip(asks, due, strict=True)))
