"""A server's life, one ordered block: listen (NOT_SERVING) -> load -> warm up -> SERVING -> drain -> stop.

The port comes first, so that a port in use is known before minutes of loading, and health checks have an answer.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Self

from ..engine_impl.api import AnyEngine
from ..engine_impl.hosts import Peers
from ..engine_impl.runtime import timeline
from ..engine_impl.runtime.compilations import programs
from .adapters.store import AdapterStore
from .config import ServerConfig
from .doors import Doors
from .errors import UnavailableError
from .gateway import Gateway
from .net.ports import FLUSH_S
from .observe.endpoint import Endpoint
from .observe.metrics import Metrics
from .observe.profile import Profile
from .observe.status import Status, StatusLine
from .observe.traces import Traces
from .process import first_of, in_thread, leave_at_once
from .request.chat import dialect_of
from .scheduler.orchestrator import Orchestrator
from .watchers import Watchers

log = logging.getLogger(__name__)

Load = Callable[[], tuple[AnyEngine, Any]]
"""Builds the engine and its params; may take minutes."""


class Serving:
    """`async with Serving(load, config) as serving:` serves inside the block and drains on leaving it."""

    def __init__(
        self, load: Load, config: ServerConfig, line: StatusLine | None = None, peers: Peers | None = None
    ) -> None:
        """`load` returns (engine, params); it is called in a thread of its own. `peers`: the other hosts of the engine.

        Raises RefusedError for a token file or certificates that cannot be used.
        """
        self.stop_requested = asyncio.Event()
        """Set by whoever wants the server to stop: a signal, a dead engine."""
        self.force_requested = asyncio.Event()
        """Set to end the drain at once."""
        self.dead_reason: str | None = None
        """Why the engine was given up."""
        self._has_begun = False  # requests may be there, whatever health checks say now
        self.orchestrator: Orchestrator[Any, Any, Any] | None = None
        self.metrics = Metrics()
        self.profile: Profile | None = None
        """--profile, if it is asked for."""
        self._load, self._config, self._line, self._peers = load, config, line, peers
        if config.watch.profile is not None:
            self.profile = Profile(config.watch.profile, config.watch.profile_s)
        self._traces = None if config.watch.otlp_endpoint is None else Traces(config.watch.otlp_endpoint)
        self.adapters = AdapterStore(config.lora.adapter_dir, config.lora.max_host_adapters)
        on_call = (lambda: None) if self.profile is None else self.profile.on_call
        self._gateway = Gateway(on_call, self._traces, self.adapters)
        self.doors = Doors(config, self._gateway, self.metrics)
        self._watchers = Watchers()

    @property
    def address(self) -> str:
        """host:port of gRPC; the port is the real one after entering."""
        return self.doors.address

    @property
    def http_address(self) -> str | None:
        """host:port of OpenAI's endpoints, after entering; None when they are not served."""
        return self.doors.http_address

    @property
    def endpoint(self) -> Endpoint | None:
        """/metrics, if there is one."""
        return self.doors.endpoint

    @property
    def is_ready(self) -> bool:
        """Whether health checks are answered with SERVING."""
        return self.doors.is_ready

    async def __aenter__(self) -> Self:
        await self.doors.open()
        if self._peers is not None:
            soon = asyncio.get_running_loop().call_soon_threadsafe
            self._peers.watch(partial(soon, self._on_lost), partial(soon, self._on_leaving))
        try:
            await self._load_and_warm_up()
            self._has_begun = True
            await self.doors.set_ready(True)
            self._watch()
        except BaseException:
            await self._watchers.stop()
            await self._close_orchestrator()
            await self.doors.close(0)
            raise
        return self

    async def __aexit__(self, *exc_info) -> None:
        log.info("stopping: NOT_SERVING, new requests are refused")
        await self._watchers.stop()
        await self.doors.begin_to_close()
        self._gateway.close("the server is stopping")
        await self._drain()
        await self._close_orchestrator()
        if self._peers is not None and self.dead_reason is None:
            await asyncio.to_thread(self._peers.stop)
        if self.profile is not None:
            await self.profile.close()
        await self.doors.close(FLUSH_S)
        log.info("stopped")

    async def _close_orchestrator(self) -> None:
        """If it has come so far."""
        if self.orchestrator is not None:
            await asyncio.to_thread(self.orchestrator.close)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def _load_and_warm_up(self) -> None:
        start = time.monotonic()
        engine, params = await in_thread(self._load)
        log.info("loaded %s in %.1f s; compiling", engine.model_name, time.monotonic() - start)
        await in_thread(lambda: dialect_of(engine.get_tokenizer().template_facts, self._config.chat))  # may be refused
        self.adapters.open(engine.read_adapter, (*self._config.served_model_name, engine.model_name))
        for name, path in self._config.lora.named.items():
            await self.adapters.load(name, path)
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self.orchestrator = Orchestrator(
            engine,
            params,
            max_queued=self._config.max_queued,
            max_queued_tokens=self._config.max_queued_tokens,
            prefix_cache=self._config.prefix_cache,
            step_timeout_s=self._config.step_timeout_s,
            metrics=self.metrics,
            on_ready=partial(loop.call_soon_threadsafe, ready.set),
            on_dead=partial(loop.call_soon_threadsafe, self._on_dead),
        )
        self.orchestrator.start()
        await first_of(ready, self.stop_requested)
        if self.dead_reason is not None:
            raise UnavailableError(self.dead_reason)
        self.metrics.watch_devices(list(engine.devices), lambda: programs().made)
        if self._traces is not None:
            self._traces.start(engine.model_name)
        self._gateway.open(engine, self.orchestrator)
        startup = timeline.THIS_PROCESS.startup()
        self.metrics.started(startup.stages)
        log.info(
            "ready after %.1f s: compiled %d programs, %d from the cache",
            startup.seconds,
            startup.programs.compiled,
            startup.programs.found,
            extra={"fields": startup.as_json()},
        )

    @property
    def hangs(self) -> bool:
        """Whether the end of the process would wait for a device, or for hosts that are gone."""
        orchestrator_hangs = self.orchestrator is not None and self.orchestrator.hangs
        return orchestrator_hangs or (self._peers is not None and self.dead_reason is not None)

    def _on_lost(self, reason: str) -> None:
        """One of the other hosts. Nothing that is started on the devices would end; requests do, during a drain too."""
        if self.orchestrator is not None and self._has_begun:
            self.orchestrator.give_up(reason)
        else:
            log.error("the group is given up: %s", reason)
            leave_at_once(1)

    def _on_leaving(self, reason: str) -> None:
        log.info("draining: %s", reason)
        self.stop_requested.set()

    def _on_dead(self, reason: str) -> None:
        self.dead_reason = reason
        self._gateway.close(reason)
        self.stop_requested.set()

    def _watch(self) -> None:
        assert self.orchestrator is not None
        if self.profile is not None:
            self.profile.arm()
        self._watchers.start(
            self._config, self.doors, self._gateway, self.orchestrator, Status(self.metrics), self._line
        )

    async def _drain(self) -> None:
        """Until the calls in flight are answered, the grace is over or somebody forces."""
        deadline = time.monotonic() + self._config.grace_s
        while self._gateway.calls and time.monotonic() < deadline and not self.force_requested.is_set():
            await asyncio.sleep(0.01)
        if self._gateway.calls:
            log.warning("cancelling %d requests that are not finished", self._gateway.calls)
