"""Callers that send one hostile input again and again, all together, in a process of their own: what it costs them to
send it must not hold up whoever measures the server, nor, as they stand for other machines, the server."""

import asyncio
import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import aiohttp
import grpc

from .hostile_inputs import DECODE, INPUTS

HEADERS = {"content-type": "application/json"}
NO_ANSWER = aiohttp.ClientConnectionError, TimeoutError
"""A server that hangs up, or takes too long: the time is what counts."""
CALL_S = 30.0
"""How long a call may take (seconds)."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What is sent, by how many, for how long."""

    name: str
    """One of INPUTS."""
    size: int
    """Of the input (bytes)."""
    callers: int
    seconds: float
    """After it nobody begins again."""


@dataclass
class Answers:
    """What the callers met."""

    waited_ms: list[float] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)
    """What they were told: HTTP's numbers or gRPC's."""


@contextmanager
def attackers() -> Iterator[ProcessPoolExecutor]:
    """The process in which attack() is to be called. It does not outlive the block."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=os.nice, initargs=(19,)) as aside:
        aside.submit(int).result()  # it has started
        yield aside


def attack(url: str, address: str, how: Attack) -> Answers:
    """Until every caller has had its last answer. `url`: of the HTTP front; `address`: of the gRPC front."""
    path, make = INPUTS[how.name]
    return asyncio.run(_attack(url, address, path, make(how.size), how))


async def _attack(url: str, address: str, path: str, body: bytes, how: Attack) -> Answers:
    answers, until = Answers(), time.perf_counter() + how.seconds
    timeout, connections = aiohttp.ClientTimeout(total=CALL_S), aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(url, connector=connections, timeout=timeout, headers=HEADERS) as session,
        grpc.aio.insecure_channel(address) as channel,
    ):

        async def post() -> int | None:
            with suppress(*NO_ANSWER):  # a server may hang up
                async with session.post(path, data=io.BytesIO(body)) as response:
                    await response.read()
                    return response.status

        decode: Any = channel.unary_stream(DECODE)

        async def call() -> int:
            """The number of a gRPC status; 0 is OK."""
            try:
                async for _ in decode(body, timeout=CALL_S):
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code().value[0]
            return 0

        async def again() -> None:
            send = call if path == DECODE else post
            while True:
                begin = time.perf_counter()
                if (status := await send()) is not None:
                    answers.statuses.add(status)
                answers.waited_ms.append(1000 * (time.perf_counter() - begin))
                if time.perf_counter() > until:
                    return

        await asyncio.gather(*(again() for _ in range(how.callers)))
    return answers
