"""What inputs made to harm do to everybody else who uses the server.

Each input is sent by one caller alone, and by several at once, again and again for a while. Meanwhile are measured: the
health checks of both doors, the pace of a running stream, the time to first token of other small requests, and the
memory of the server's processes, before, at its peak, and when all is over.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from ..engine_impl.errors import RefusedError
from ..server.child import server
from ..server.net.ports import listening
from .load.hostile_callers import CALL_S, HEADERS, NO_ANSWER, Answers, Attack, attack, attackers
from .load.hostile_inputs import COMPLETIONS, INPUTS
from .measure import machine
from .measure.stats import percentile
from .measure.table import Progress, table
from .options.flags import facts
from .options.hostile import HostileOptions

USUAL_S = 2.0
"""How long the undisturbed server is measured before each input (seconds)."""
SETTLE_S = 1.0
"""Time that memory gets to come back (seconds)."""

MAX_HEALTH_MS, WORST_HEALTH_MS, MAX_TTFT_GROWTH_MS, MAX_SLOWDOWN = 300.0, 1000.0, 500.0, 1.5
MAX_PEAK_MIB = 200.0
"""What must hold: health checks (p99 and the worst; what this process waits for a processor meanwhile is not theirs),
the growth of the median time to first token, the stream's slowdown, and memory on top."""
NAP_S = 0.005
"""A sleep whose lateness tells how long this process waits for a processor (seconds)."""


@dataclass
class Watched:
    """What was seen during one attack, or without one."""

    health_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    """How late this process woke from its naps."""
    ttft_ms: list[float] = field(default_factory=list)
    chunks: int = 0
    """Of the stream."""
    memory_mib: list[float] = field(default_factory=list)
    seconds: float = 0.0
    answers: Answers = field(default_factory=Answers)
    """To the hostile callers."""

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
    with server(options.engine, "--http-port", str(port)) as (process, address, _), attackers() as aside:
        rows = asyncio.run(measure(f"http://127.0.0.1:{port}", address, process.pid, aside, options))
    print(summary(rows))
    return {"plan": facts(options), "sweep": rows, "load_average": load_average} | machine.describe(
        machine.use_threads(None)
    )


async def measure(url: str, address: str, pid: int, aside: Executor, options: HostileOptions) -> list[dict[str, Any]]:
    """A row for each input and number of callers. `aside`: where attack() is called."""
    rows, progress, loop = [], Progress(), asyncio.get_running_loop()
    timeout = aiohttp.ClientTimeout(total=CALL_S)
    async with (
        aiohttp.ClientSession(url, timeout=timeout, headers=HEADERS) as session,
        grpc.aio.insecure_channel(address) as channel,
    ):
        watcher = Watcher(session, channel, pid)
        for name, (_, make) in INPUTS.items():
            if options.names and name not in options.names:
                continue
            size = len(make(options.input_bytes))
            usual = await watcher.watch(asyncio.sleep(USUAL_S, Answers()))
            for callers in (1, options.callers):
                progress.show(f"{name}, {callers} at once ...")
                before = memory_mib(pid)
                how = Attack(name=name, size=options.input_bytes, callers=callers, seconds=options.seconds)
                seen = await watcher.watch(loop.run_in_executor(aside, attack, url, address, how))
                await asyncio.sleep(SETTLE_S)
                rows.append(row(name, size, callers, usual, seen, before, memory_mib(pid)))
    progress.clear()
    return rows


class Watcher:
    """Asks one server what everybody else would."""

    def __init__(self, session: aiohttp.ClientSession, channel: grpc.aio.Channel, pid: int) -> None:
        self._session, self._pid = session, pid
        self._check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")

    async def watch(self, attacked: Awaitable[Answers]) -> Watched:
        """Until that is over."""
        seen, begin = Watched(), time.perf_counter()
        watchers = [
            asyncio.create_task(watch(seen))
            for watch in (self._health, self._grpc_health, self._small, self._stream, self._memory, nap)
        ]
        seen.answers = await attacked
        seen.seconds = time.perf_counter() - begin
        for watcher in watchers:
            watcher.cancel()
        for outcome in await asyncio.gather(*watchers, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return seen

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


async def nap(seen: Watched) -> None:
    while True:
        begin = time.perf_counter()
        await asyncio.sleep(NAP_S)
        seen.late_ms.append(1000 * (time.perf_counter() - begin - NAP_S))


def memory_mib(pid: int) -> float:
    """Memory that a process and its children have for themselves (MiB). It is asked for while the server works: what
    reads all page tables, such as smaps_rollup, would hold it up."""
    return _own_mib(pid) + sum(_own_mib(number) for number in _children(pid) if _command(number) != _command(pid))


def _children(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, path.read_text().split())


def _command(pid: int) -> bytes:
    """A child that has not yet become its own program still has its parent's command, and uses its parent's memory."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _own_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def row(
    name: str,
    size: int,
    callers: int,
    usual: Watched,
    seen: Watched,
    before_mib: float,
    after_mib: float,
) -> dict[str, Any]:
    """The numbers of one attack, and what of them must not be."""
    ttft_growth_ms = _p(seen.ttft_ms, 50) - _p(usual.ttft_ms, 50)
    slowdown = usual.chunks_per_second / max(seen.chunks_per_second, 1e-9)
    peak_mib = max(seen.memory_mib, default=before_mib) - before_mib
    health_ms, late_ms, worst_ms = _p(seen.health_ms, 99), _p(seen.late_ms, 99), max(seen.health_ms)
    faults = [
        f"{what} {value:.4g} exceeds {limit:g}"
        for what, value, limit in (
            ("health checks' p99 (ms)", health_ms - late_ms, MAX_HEALTH_MS),
            ("the worst health check (ms)", worst_ms - max(seen.late_ms), WORST_HEALTH_MS),
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
        "answers": len(seen.answers.waited_ms),
        "answer_ms_max": round(max(seen.answers.waited_ms), 1),
        "statuses": sorted(seen.answers.statuses),
        "health_ms_p99": round(health_ms, 1),
        "health_ms_max": round(worst_ms, 1),
        "late_ms_p99": round(late_ms, 1),
        "late_ms_max": round(max(seen.late_ms), 1),
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
        "late_ms_p99": "machine ms p99",
        "late_ms_max": "max",
        "ttft_growth_ms_p50": "TTFT + ms p50",
        "slowdown": "slowdown",
        "peak_mib": "peak + MiB",
        "kept_mib": "kept MiB",
    }
    cells = [[row[name] for name in headers] for row in rows]
    faults = [f"{row['input']}, {row['callers']} callers: {fault}" for row in rows for fault in row["faults"]]
    return "\n".join([table(list(headers.values()), cells), *faults])
