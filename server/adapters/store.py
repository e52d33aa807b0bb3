"""The adapters that requests may name. They wait in the host's memory; the scheduler brings them onto the devices.

One event loop's: reading happens in a thread, one adapter at a time.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...engine_impl.errors import RefusedError
from ..errors import DeadlineError, UnavailableError, UnknownModelError
from ..request.adapter import LoadedAdapter

log = logging.getLogger(__name__)

LONGEST_NAME = 128
NAME = re.compile(r"[\w./:@-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What is told of an adapter."""

    name: str
    status: Literal["loading", "loaded_cpu", "loaded_hbm"]
    read_s: float = 0.0
    """what reading it took (seconds)"""
    device_bytes: int = 0
    """of all devices' memory"""
    host_bytes: int = 0
    last_asked: float = 0.0
    """s since 1970"""


class AdapterStore:
    """`load()`, `unload()`, `get()`; `open()` it first."""

    def __init__(self, folder: Path | None = None, most: float = math.inf) -> None:
        """`folder`: below it callers may load from. None: nowhere. `most`: that may be there at once (adapters)."""
        self._folder, self._most = folder, most
        self._read: Callable[[str], Any] | None = None
        self._model_names: Collection[str] = ()
        self._adapters: dict[str, LoadedAdapter] = {}
        self._loading: dict[str, tuple[str, asyncio.Task[LoadedAdapter]]] = {}  # path, and who reads it
        self._thread = ThreadPoolExecutor(1, "adapters")

    def open(self, read: Callable[[str], Any], model_names: Collection[str]) -> None:
        """`read`: `Engine.read_adapter`. `model_names`: the base's, which no adapter may have."""
        self._read, self._model_names = read, model_names

    def close(self) -> None:
        """Loads that have not begun do not begin any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[LoadedAdapter]:
        """Those that are there, by name."""
        return iter([self._adapters[name] for name in sorted(self._adapters)])

    def listed(self, on_devices: Collection[LoadedAdapter]) -> list[AdapterInfo]:
        """Those that are there and those that are being read, by name."""
        infos = [AdapterInfo(name=name, status="loading") for name in self._loading]
        for adapter in self._adapters.values():
            is_there = adapter in on_devices
            infos.append(
                AdapterInfo(
                    name=adapter.name,
                    status="loaded_hbm" if is_there else "loaded_cpu",
                    read_s=adapter.read_s,
                    device_bytes=adapter.weights.device_bytes if is_there else 0,
                    host_bytes=adapter.weights.bytes,
                    last_asked=adapter.last_asked,
                )
            )
        return sorted(infos, key=lambda info: info.name)

    @property
    def names(self) -> list[str]:
        """Those that requests may ask for."""
        return sorted({*self._adapters, *self._loading})

    def knows(self, name: str) -> bool:
        """Whether requests may name it."""
        return name in self._adapters or name in self._loading

    def check(self, name: str) -> None:
        """Raises UnknownModelError for a name that is neither loaded nor being loaded."""
        if not self.knows(name):
            raise UnknownModelError(f"adapter {name!r:.200} is not there; load it first")

    def allowed(self, path: str) -> str:
        """The path that a caller may load from, links followed. Raises RefusedError for any other."""
        if self._folder is None:
            raise RefusedError("no adapter may be loaded by callers; serve with --adapter-dir FOLDER")
        folder = self._folder.resolve()
        try:
            asked = (folder / path).resolve()
            is_there = folder in asked.parents and asked.is_dir()
        except (OSError, RuntimeError, ValueError):  # a name that no file can have, links in a circle
            is_there = False
        if not is_there:
            raise RefusedError(f"adapter_path={path!r:.200} must be a folder below adapter_dir={str(self._folder)!r}")
        return str(asked)

    async def load(self, name: str, path: str, *, anew: bool = False) -> LoadedAdapter:
        """Reads an adapter; one that is there already from this path is left as it is, unless `anew`.

        Raises RefusedError for what cannot be read, for a name that another one has, and beyond what may be there;
        UnavailableError when the store is closed first.
        """
        if self._read is None or len(name) > LONGEST_NAME or not NAME.fullmatch(name) or name in self._model_names:
            raise RefusedError(
                f"adapter name {name!r:.200} must have from 1 to {LONGEST_NAME} letters, digits and ./:@-_ and not be "
                f"the model's, {' or '.join(map(repr, self._model_names))}"
            )
        adapter, (loads_from, task) = self._adapters.get(name), self._loading.get(name, ("", None))
        earlier = loads_from or (adapter.path if adapter is not None and not anew else path)
        if earlier != path:
            raise RefusedError(f"adapter {name!r} is loaded from {earlier!r} already; unload it, or take another name")
        if task is None:
            if adapter is not None and not anew:
                return adapter
            if len(others := {*self.names} - {name}) >= self._most:
                raise RefusedError(
                    f"{len(others)} adapters are in the host's memory and max_host_adapters={self._most}; unload one, "
                    "or serve with a larger --max-host-adapters"
                )
            task = asyncio.create_task(self._loaded(name, path, self._read))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # told to whoever waits
            self._loading[name] = path, task
        return await asyncio.shield(task)

    def unload(self, name: str) -> LoadedAdapter:
        """Requests cannot name it any more; those that have it go on. Raises UnknownModelError."""
        if name not in self._adapters:
            self.check(name)
            raise RefusedError(f"adapter {name!r} is being loaded; unload it when it is there")
        adapter = self._adapters.pop(name)
        adapter.is_served = False
        log.info("adapter %s is unloaded", name)
        return adapter

    async def get(self, name: str, deadline: float | None = None) -> LoadedAdapter:
        """The adapter of this name; waits for one that is being loaded, until `deadline` (s of time.monotonic()).

        Raises UnknownModelError, DeadlineError, and what its loading ended with.
        """
        self.check(name)
        adapter = self._adapters.get(name)
        if adapter is None:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                async with asyncio.timeout(left_s):
                    adapter = await asyncio.shield(self._loading[name][1])
            except TimeoutError:
                raise DeadlineError(f"the deadline passed while adapter {name!r} was being loaded") from None
        adapter.last_asked = time.time()
        return adapter

    async def _loaded(self, name: str, path: str, read: Callable[[str], Any]) -> LoadedAdapter:
        started = time.monotonic()
        try:
            weights = await asyncio.get_running_loop().run_in_executor(self._thread, read, path)
        except asyncio.CancelledError:  # by close(): whoever waits was not cancelled himself
            raise UnavailableError(f"adapter {name!r} is not loaded any more: the server is stopping") from None
        finally:
            del self._loading[name]
        adapter = LoadedAdapter(name, path, weights, time.monotonic() - started)
        if (earlier := self._adapters.get(name)) is not None:
            earlier.is_served = False
        self._adapters[name] = adapter
        log.info(
            "adapter %s: rank %d, %.1f MiB, read in %.1f s",
            name, weights.rank, weights.bytes / 2**20, adapter.read_s,
        )  # fmt: skip
        return adapter
