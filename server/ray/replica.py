"""A replica: one engine, under the health checks, the autoscaling and the drain of Ray Serve."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing

from ...engine_impl.config import EngineConfig
from ..config import ServerConfig
from ..errors import UnavailableError
from ..observe import logs
from .calls import GrpcCall, GrpcEnd, HttpCall, HttpHead
from .fronts import Fronts
from .scaling import QUEUED, RUNNING


class EngineReplica:
    """Serve makes it, and has it ready when `__init__` is over: loaded, compiled, warm."""

    async def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:  # pyright: ignore[reportGeneralTypeIssues]
        from ...engine_impl.loading import load_engine

        logs.configure(server.watch.log_format, prompts=server.watch.log_prompts)
        self._probe_timeout_s = server.probe_timeout_s
        self._is_open = False
        self._fronts = Fronts(lambda: load_engine(engine), server)
        await self._fronts.__aenter__()
        self._is_open = True
        gc.freeze()  # as in `slipstream serve`

    async def http(self, call: HttpCall) -> AsyncGenerator[HttpHead | bytes]:
        """See Fronts.http."""
        async with aclosing(self._fronts.http(call)) as parts:
            async for part in parts:
                yield part

    async def grpc(self, call: GrpcCall) -> AsyncGenerator[bytes | GrpcEnd]:
        """See Fronts.grpc."""
        async with aclosing(self._fronts.grpc(call)) as parts:
            async for part in parts:
                yield part

    async def check_health(self) -> None:
        """A step of the engine, run and read. Raises UnavailableError; three times in a row, and Serve replaces us."""
        await asyncio.to_thread(self._fronts.orchestrator.probe, self._probe_timeout_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load, for scaling.py (requests)."""
        try:
            engine = self._fronts.orchestrator
        except UnavailableError:
            return {QUEUED: 0, RUNNING: 0}
        return {QUEUED: engine.queue_depth, RUNNING: engine.in_work}

    def __del__(self) -> Coroutine[None, None, None] | None:
        """Serve calls it when requests have ended or their time is over, and awaits what it returns."""
        return self._close() if self._is_open else None

    async def _close(self) -> None:
        self._is_open = False
        await self._fronts.__aexit__()
