"""What goes on beside requests while a server is ready: the engine is probed, freed memory goes back, a person is told
how things stand."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from ..engine_impl.runtime import allocator
from .config import ServerConfig
from .doors import Doors
from .errors import UnavailableError
from .gateway import Gateway
from .observe.status import Status, StatusLine
from .scheduler.orchestrator import Orchestrator

log = logging.getLogger(__name__)

MEMORY_S = 10.0
"""How often an idle server returns memory to the system (seconds)."""


class Watchers:
    """start() them, stop() them."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(
        self,
        config: ServerConfig,
        doors: Doors,
        gateway: Gateway,
        orchestrator: Orchestrator[Any, Any, Any],
        status: Status,
        line: StatusLine | None,
    ) -> None:
        """Those that the config asks for; `line`: where `status` is told, if anywhere."""
        self._add(give_back_memory(gateway))
        if config.probe_interval_s:
            self._add(probe(orchestrator, doors, every_s=config.probe_interval_s, timeout_s=config.probe_timeout_s))
        if line is not None and line.is_shown:
            self._add(status.run(line))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _add(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))


async def give_back_memory(gateway: Gateway) -> None:
    """What requests have left behind, while there are none."""
    while True:
        await asyncio.sleep(MEMORY_S)
        if not gateway.calls:
            await asyncio.to_thread(allocator.give_back)


async def probe(orchestrator: Orchestrator[Any, Any, Any], doors: Doors, *, every_s: float, timeout_s: float) -> None:
    """Ready as long as the device answers."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await asyncio.to_thread(orchestrator.probe, timeout_s)
        except UnavailableError as error:
            if doors.is_ready:
                log.error("NOT_SERVING: %s", error)
                await doors.set_ready(False)
        else:
            if not doors.is_ready:
                log.info("SERVING: the engine answers again")
                await doors.set_ready(True)
