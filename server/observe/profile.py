"""`--profile DIR`: a bounded trace by JAX's profiler, from the first request on and again at every SIGUSR1."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


class Profile:
    """All in the event loop's thread; the profiler itself works in another."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._is_armed = False
        self._window: asyncio.Task[None] | None = None
        self.is_tracing = False

    def on_call(self) -> None:
        """Starts the first trace."""
        if self._is_armed:
            self._is_armed = False
            self.start()

    def arm(self) -> None:
        """The next request is the first one: those before were refused."""
        self._is_armed = True

    def start(self) -> None:
        """One trace at a time: while one runs, nothing happens."""
        if self._window is None or self._window.done():
            self._window = asyncio.create_task(self._trace())

    async def close(self) -> None:
        """Ends the trace that runs, and writes it."""
        if self._window is not None:
            self._window.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._window

    async def _trace(self) -> None:
        from ...engine_impl.runtime import tracing

        try:
            await asyncio.to_thread(tracing.start, self._folder)
        except Exception as error:  # a full disk must not end the server
            log.error("no trace: %s", error)
            return
        log.info("tracing for %g s", self._seconds)
        self.is_tracing = True
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self.is_tracing = False
            await asyncio.to_thread(self._write, tracing.stop)

    def _write(self, stop: Callable[[], None]) -> None:
        try:
            stop()
        except Exception as error:
            log.error("the trace is lost: %s", error)
        else:
            log.info("traced %g s into %s", self._seconds, self._folder)
