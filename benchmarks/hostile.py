"""What inputs made to harm do to everybody else who uses the server.

Each input is sent by one caller alone, and by several at once, again and again for a while. Meanwhile are measured: the
health checks of both doors, the pace of a running stream, the time to first token of other small requests, and the
memory of the server's processes, before, at its peak, and when all is over.
"""

import asyncio
import io
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from ..engine_impl.errors import RefusedError
from ..server.child import server
from ..server.net.ports import listening
from .load.hostile_inputs import COMPLETIONS, DECODE, INPUTS
from .measure import machine
from .measure.stats import percentile
from .measure.table import Progress, table
from .options.flags import facts
from .options.hostile import HostileOptions

HEADERS = {"content-type": "application/json"}
USUAL_S = 2.0
"""How long the undisturbed server is measured (seconds)."""
SETTLE_S = 1.0
"""Time that memory gets to come back (seconds)."""
CALL_S = 30.0

NO_ANSWER = aiohttp.ClientConnectionError, TimeoutError
"""A server that hangs up, or takes too long: the time is what counts."""

MAX_HEALTH_MS, MAX_TTFT_GROWTH_MS, MAX_SLOWDOWN = 1000.0, 500.0, 1.5
MAX_PEAK_MIB = 200.0
"""What must hold: the worst health check, the growth of the median time to first token, the stream's slowdown, and
memory on top."""


@dataclass
class Watched:
    """What was seen during one attack, or without one."""

    health_ms: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    chunks: int = 0
    """Of the stream."""
    memory_mib: list[float] = field(default_factory=list)
    seconds: float = 0.0
    answers_ms: list[float] = field(default_factory=list)
    """How long the hostile callers waited."""
    statuses: set[int] = field(default_factory=set)
    """What they were told: HTTP's numbers or gRPC's."""

    @property
    def chunks_per_second(self) -> float:
        return self.chunks / self.seconds


def run(options: HostileOptions) -> dict[str, Any]:
    """Raises RefusedError for an input that is not known."""
    if unknown := [name for name in options.names if name not in INPUTS]:
        raise RefusedError(f"only={unknown[0]!r} is not known; those that are: {', '.join(INPUTS)}")
    with listening("127.0.0.1", 0, what="HTTP", flag="--http-port")[0] as sock:
        port = sock.getsockname()[1]
    load_average = machine.warn_if_busy()
    with server(options.engine, "--http-port", str(port)) as (process, address, _):
        rows = asyncio.run(measure(f"http://127.0.0.1:{port}", address, process.pid, options))
    print(summary(rows))
    return {"plan": facts(options), "sweep": rows, "load_average": load_average} | machine.describe(
        machine.use_threads(None)
    )


async def measure(url: str, address: str, pid: int, options: HostileOptions) -> list[dict[str, Any]]:
    """A row for each input and number of callers."""
    rows, progress = [], Progress()
    connections = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=CALL_S)
    async with (
        aiohttp.ClientSession(url, connector=connections, timeout=timeout, headers=HEADERS) as session,
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as hostile_channel,
    ):
        watcher = Watcher(session, channel, hostile_channel, pid)
        usual = await watcher.watch(None, 0, USUAL_S)
        for name, (path, make) in INPUTS.items():
            if options.names and name not in options.names:
                continue
            body = make(options.input_bytes)
            for callers in (1, options.callers):
                progress.show(f"{name}, {callers} at once ...")
                before = memory_mib(pid)
                seen = await watcher.watch((path, body), callers, options.seconds)
                await asyncio.sleep(SETTLE_S)
                rows.append(row(name, len(body), callers, usual, seen, before, memory_mib(pid)))
    progress.clear()
    return rows


class Watcher:
    """Asks one server what everybody else would."""

    def __init__(
        self, session: aiohttp.ClientSession, channel: grpc.aio.Channel, hostile: grpc.aio.Channel, pid: int
    ) -> None:
        """`hostile`: a connection of the hostile callers' own."""
        self._session, self._pid = session, pid
        self._check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        self._decode: Any = hostile.unary_stream(DECODE)

    async def watch(self, attack: tuple[str, bytes] | None, callers: int, seconds: float) -> Watched:
        """Until every caller has had its last answer, `seconds` at least."""
        seen, begin = Watched(), time.perf_counter()
        watchers = [
            asyncio.create_task(watch(seen)) for watch in (self._health, self._grpc_health, self._small, self._stream)
        ]
        watchers.append(asyncio.create_task(self._memory(seen)))
        until = begin + seconds
        if attack is None:
            await asyncio.sleep(seconds)
        else:
            await asyncio.gather(*(self._attack(*attack, until, seen) for _ in range(callers)))
        seen.seconds = time.perf_counter() - begin
        for watcher in watchers:
            watcher.cancel()
        for outcome in await asyncio.gather(*watchers, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return seen

    async def _attack(self, path: str, body: bytes, until: float, seen: Watched) -> None:
        while True:
            begin = time.perf_counter()
            if path == DECODE:
                seen.statuses.add(await self._told(body))
            else:
                with suppress(*NO_ANSWER):  # a server may hang up
                    async with self._session.post(path, data=io.BytesIO(body)) as response:
                        await response.read()
                        seen.statuses.add(response.status)
            seen.answers_ms.append(1000 * (time.perf_counter() - begin))
            if time.perf_counter() > until:
                return

    async def _told(self, message: bytes) -> int:
        """The number of a gRPC status; 0 is OK."""
        try:
            async for _ in self._decode(message, timeout=CALL_S):
                pass
        except grpc.aio.AioRpcError as error:
            return error.code().value[0]
        return 0

    async def _health(self, seen: Watched) -> None:
        async def ask() -> None:
            async with self._session.get("/health") as response:
                await response.read()

        await self._again(ask, seen.health_ms)

    async def _grpc_health(self, seen: Watched) -> None:
        async def ask() -> None:
            await self._check(b"")

        await self._again(ask, seen.health_ms)

    async def _small(self, seen: Watched) -> None:
        async def ask() -> None:
            async with self._session.post(COMPLETIONS, json={"prompt": "The sea is", "max_tokens": 1}) as response:
                await response.read()
                response.raise_for_status()

        await self._again(ask, seen.ttft_ms)

    @staticmethod
    async def _again(ask: Any, times_ms: list[float]) -> None:
        while True:
            begin = time.perf_counter()
            try:
                with suppress(*NO_ANSWER):
                    await ask()
            finally:  # one that is under way at the end counts with what it took so far
                times_ms.append(1000 * (time.perf_counter() - begin))
            await asyncio.sleep(0.02)

    async def _stream(self, seen: Watched) -> None:
        body = {"prompt": "The sea is", "max_tokens": 200, "ignore_eos": True, "stream": True}
        while True:
            with suppress(*NO_ANSWER):
                async with self._session.post(COMPLETIONS, json=body) as response:
                    async for line in response.content:
                        seen.chunks += line.startswith(b"data:")

    async def _memory(self, seen: Watched) -> None:
        while True:
            seen.memory_mib.append(memory_mib(self._pid))
            await asyncio.sleep(0.05)


def memory_mib(pid: int) -> float:
    """Memory of a process and its children, what they share counted once (MiB)."""
    return _share_mib(pid) + sum(_share_mib(number) for number in _children(pid) if _command(number) != _command(pid))


def _children(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, path.read_text().split())


def _command(pid: int) -> bytes:
    """A child that has not yet become its own program still has its parent's command, and uses its parent's memory."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _share_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def row(
    name: str, size: int, callers: int, usual: Watched, seen: Watched, before_mib: float, after_mib: float
) -> dict[str, Any]:
    """The numbers of one attack, and what of them must not be."""
    ttft_growth_ms = _p(seen.ttft_ms, 50) - _p(usual.ttft_ms, 50)
    slowdown = usual.chunks_per_second / max(seen.chunks_per_second, 1e-9)
    peak_mib = max(seen.memory_mib, default=before_mib) - before_mib
    faults = [
        f"{what} {value:.4g} exceeds {limit:g}"
        for what, value, limit in (
            ("the worst health check (ms)", max(seen.health_ms), MAX_HEALTH_MS),
            ("the growth of the time to first token (ms)", ttft_growth_ms, MAX_TTFT_GROWTH_MS),
            ("the stream's slowdown", slowdown, MAX_SLOWDOWN),
            ("the growth of memory (MiB)", peak_mib, MAX_PEAK_MIB),
        )
        if value > limit
    ]
    return {
        "input": name,
        "bytes": size,
        "callers": callers,
        "answers": len(seen.answers_ms),
        "answer_ms_max": round(max(seen.answers_ms), 1),
        "statuses": sorted(seen.statuses),
        "health_ms_p99": round(_p(seen.health_ms, 99), 1),
        "health_ms_max": round(max(seen.health_ms), 1),
        "ttft_growth_ms_p50": round(ttft_growth_ms, 1),
        "ttft_ms_max": round(max(seen.ttft_ms), 1),
        "slowdown": round(slowdown, 2),
        "peak_mib": round(peak_mib, 1),
        "kept_mib": round(after_mib - before_mib, 1),
        "faults": faults,
    }


def _p(values: list[float], q: float) -> float:
    return percentile(values, q) or 0.0


def summary(rows: list[dict[str, Any]]) -> str:
    """A table, and below it what must not be."""
    headers = {
        "input": "input",
        "callers": "callers",
        "answers": "answers",
        "answer_ms_max": "answer ms max",
        "health_ms_p99": "health ms p99",
        "health_ms_max": "max",
        "ttft_growth_ms_p50": "TTFT + ms p50",
        "slowdown": "slowdown",
        "peak_mib": "peak + MiB",
        "kept_mib": "kept MiB",
    }
    cells = [[row[name] for name in headers] for row in rows]
    faults = [f"{row['input']}, {row['callers']} callers: {fault}" for row in rows for fault in row["faults"]]
    return "\n".join([table(list(headers.values()), cells), *faults])
