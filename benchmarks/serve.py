"""A running server under load: latencies, throughput, goodput, refusals.

Closed loop: a fixed number of requests is in flight; as one ends the next is sent. Open loop: requests come at a rate,
whether the ones before are answered or not, and their latency counts from when they were due. The first `warm_up`
requests of each load run like the rest and are left out of every number.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..engine_impl.errors import RefusedError
from ..server.channel import PLAIN, ChannelConfig
from ..server.errors import FailedError
from .caller import Caller, Record
from .grpc_caller import GrpcCaller
from .http_caller import HttpCaller
from .report import Slo, report
from .table import Progress, table
from .workload import OUTPUT, PROMPT, Ask, arrivals, id_range, lengths, make_requests


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """What is asked; see the flags of `slipstream bench serve`."""

    target: str
    pattern: Literal["closed", "poisson", "bursts"]
    requests: int
    warm_up: int
    burst_size: int
    prompt_lengths: str
    output_lengths: str
    token_ids: str
    max_length: int | None
    seed: int
    slo_ms: dict[str, float | None]
    timeout_s: float
    ignore_eos: bool = False
    model: str | None = None
    channel: ChannelConfig = PLAIN


def run(plan: ServePlan, loads: list[float], plot: Path | None) -> dict[str, Any]:
    """Each load in turn: {"loads": [one object each], ...the plan}.

    Raises RefusedError for lengths that cannot be read, UnavailableError when nobody answers, FailedError when no
    request of a load was answered.
    """
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    asks = make_requests(
        plan.warm_up + plan.requests,
        lengths(plan.prompt_lengths, PROMPT),
        lengths(plan.output_lengths, OUTPUT),
        ids=id_range(plan.token_ids),
        max_length=plan.max_length,
        seed=plan.seed,
    )
    if plan.max_length is not None and plan.max_length < 2:
        raise RefusedError(f"max_length={plan.max_length} must be at least 2: one token of prompt, one of answer")
    results = [asyncio.run(run_load(plan, asks, load)) for load in loads]
    print(summary(plan, results))
    if plot is not None:
        from .plot import plot_loads

        plot_loads(plot, plan.pattern, results)
    facts = asdict(plan)
    facts.pop("channel")  # paths on the caller's machine
    return facts | {"loads": results}


def caller_of(plan: ServePlan) -> Caller:
    """By the target's scheme: HTTP where it has one, else gRPC. Raises RefusedError for files that cannot be used."""
    common = {"timeout_s": plan.timeout_s, "security": plan.channel, "ignore_eos": plan.ignore_eos}
    if "://" in plan.target:
        return HttpCaller(plan.target, **common, model=plan.model)
    return GrpcCaller(plan.target, **common)


async def run_load(plan: ServePlan, asks: list[Ask], load: float) -> dict[str, Any]:
    """One row of the table."""
    progress, done = Progress(), []

    def on_done(record: Record) -> None:
        done.append(record)
        rejected = sum(record.status == "rejected" for record in done)
        speed = sum(record.tokens for record in done) / (time.perf_counter() - start)
        progress.bar(len(done), len(asks), f"load {load:g}: {speed:.0f} tokens/s, {rejected} rejected")

    async with caller_of(plan) as caller:
        start = time.perf_counter()
        if plan.pattern == "closed":
            records = await closed(caller, asks, int(load), on_done)
        else:
            burst_size = plan.burst_size if plan.pattern == "bursts" else 1
            due = arrivals(len(asks), load, burst_size=burst_size, seed=plan.seed)
            records = await opened(caller, asks, due, on_done)
    progress.clear()
    counted = records[plan.warm_up :]
    result = {"load": load} | report(counted, Slo(**{f"{name}_ms": limit for name, limit in plan.slo_ms.items()}))
    if not result["completed"] and not result["rejected"]:
        raise FailedError(f"none of {len(counted)} requests was answered; the first: {counted[0].detail}")
    return result


async def closed(caller: Caller, asks: list[Ask], in_flight: int, on_done: Callable[[Record], None]) -> list[Record]:
    """Records in the order of `asks`."""
    records: dict[int, Record] = {}
    waiting = iter(enumerate(asks))

    async def work() -> None:
        for index, ask in waiting:
            records[index] = await caller.call(ask, time.perf_counter())
            on_done(records[index])

    await asyncio.gather(*(work() for _ in range(in_flight)))
    return [records[index] for index in range(len(asks))]


async def opened(caller: Caller, asks: list[Ask], due: list[float], on_done: Callable[[Record], None]) -> list[Record]:
    """Request i is sent `due[i]` seconds from now. Records in the order of `asks`."""
    start = time.perf_counter()

    async def send(ask: Ask, due: float) -> Record:
        await asyncio.sleep(due - time.perf_counter())
        record = await caller.call(ask, due)
        on_done(record)
        return record

    return await asyncio.gather(*(send(ask, start + at) for ask, at in zip(asks, due, strict=True)))


def summary(plan: ServePlan, results: list[dict[str, Any]]) -> str:
    """The results as a table; latencies are p50 / p90 / p99."""
    unit = "in flight" if plan.pattern == "closed" else "requests/s"
    headers = [unit, "done", "rejected", "failed", "tokens/s", "goodput/s", "TTFT ms", "TPOT ms", "ITL ms", "e2e ms"]
    rows = [
        [
            result["load"], result["completed"], result["rejected"], result["failed"],
            result["tokens_per_second"], result["goodput_requests_per_second"],
            *(_latencies(result[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")),
        ]
        for result in results
    ]  # fmt: skip
    head = f"{plan.target}: {plan.pattern}, {plan.requests} requests a load, {plan.warm_up} more to warm up"
    return f"{head}, prompts {plan.prompt_lengths}, answers {plan.output_lengths}; latencies p50 / p90 / p99\n" + table(
        headers, rows
    )


def _latencies(of: dict[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in of.values())
