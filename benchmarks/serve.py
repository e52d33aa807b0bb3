"""A running server under load: latencies, throughput, goodput, refusals.

The first `warm_up` requests of each load run like the rest and are left out of every number. Every block has prompts of
its own, so that no server finds them among its cached prefixes, but for the tokens that are shared on purpose.

Two servers take turns (A B A B): each load is run at one while the other is idle, then at the other, several times.
"""

import asyncio
import itertools
import sys
import time
from typing import Any, NamedTuple

from ..server.errors import FailedError
from .load.caller import Caller, Record
from .load.loops import closed, opened
from .load.report import Slo, report
from .load.workload import OUTPUT, PROMPT, LoadRequest, arrivals, lengths, make_requests
from .measure.machine import describe_client
from .measure.stats import Ratio
from .measure.table import Progress, table
from .options.serve import ServeOptions
from .options.targets import Side
from .sides import callers_of

CLIENT_BUSY = 0.9
"""Beyond this share of a core the client may be what is measured."""


class Block(NamedTuple):
    """One load at one server."""

    records: list[Record]
    """without the warm-up"""
    client_cpu_share: float
    """of one core, warm-up included"""


def run(options: ServeOptions) -> dict[str, Any]:
    """Each load in turn: {"loads": [one object each], ...the flags}.

    Raises RefusedError for lengths that cannot be read, UnavailableError when nobody answers, FailedError when no
    request of a load was answered.
    """
    if options.plot is not None:
        from .measure.plot import check_plot

        check_plot(options.plot)
    asks = requests_of(options)
    client = describe_client()
    results = [
        asyncio.run(run_load(options, of_blocks, load)) for load, of_blocks in zip(options.loads, asks, strict=True)
    ]
    print(summary(options, results))
    if options.plot is not None:
        from .measure.plot import plot_loads

        plot_loads(options.plot, options.pattern, results)
    return options.facts() | {"client": client, "loads": results}


def requests_of(options: ServeOptions) -> list[list[list[LoadRequest]]]:
    """By load and block. Raises RefusedError for lengths that cannot be read."""
    prompt, output = lengths(options.prompt_lengths, PROMPT), lengths(options.output_lengths, OUTPUT)
    block = itertools.count()
    return [
        [
            make_requests(
                options.warm_up + options.requests, prompt, output, ids=options.ids, max_length=options.max_length,
                seed=options.seed, block=next(block), prefix_share=options.prefix_share,
            )
            for _ in range(options.blocks)
        ]
        for _ in options.loads
    ]  # fmt: skip


async def run_load(options: ServeOptions, of_blocks: list[list[LoadRequest]], load: float) -> dict[str, Any]:
    """The first side's numbers, and with a second one its numbers and the ratios, pair by pair."""
    blocks: list[list[Block]] = [[] for _ in options.sides]
    async with callers_of(options, ignore_eos=options.ignore_eos) as callers:
        for asks in of_blocks:
            for side, caller, its_blocks in zip(options.sides, callers, blocks, strict=True):
                its_blocks.append(await run_block(options, side, caller, asks, load))
    slo = Slo(**{f"{name}_ms": limit for name, limit in options.slo_ms.items()})
    rows = [numbers_of(its_blocks, slo) for its_blocks in blocks]
    if (share := max(row["client_cpu_share"] for row in rows)) > CLIENT_BUSY:
        print(
            f"warning: load {load:g}: the client used {share:.2f} of its one core; it may be what is measured",
            file=sys.stderr,
        )
    if len(rows) == 1:
        return {"load": load} | rows[0]
    if rows[0]["output_tokens"] != rows[1]["output_tokens"]:
        counts = " and ".join(str(row["output_tokens"]) for row in rows)
        print(f"warning: load {load:g}: the servers gave {counts} tokens, not the same work", file=sys.stderr)
    return {"load": load} | rows[0] | {"versus": rows[1]} | ratios(*blocks)


def numbers_of(blocks: list[Block], slo: Slo) -> dict[str, Any]:
    """One server's numbers, of all its blocks."""
    numbers = report([block.records for block in blocks], slo)
    return numbers | {"client_cpu_share": round(max(block.client_cpu_share for block in blocks), 4)}


async def run_block(options: ServeOptions, side: Side, caller: Caller, asks: list[LoadRequest], load: float) -> Block:
    """Raises FailedError when nothing can be said of it."""
    progress, done = Progress(), []

    def on_done(record: Record) -> None:
        done.append(record)
        rejected = sum(record.status == "rejected" for record in done)
        speed = sum(record.tokens for record in done) / (time.perf_counter() - start)
        text = f"{side.target}, load {load:g}: {speed:.0f} tokens/s, {rejected} rejected"
        progress.bar(len(done), len(asks), text)

    start, cpu = time.perf_counter(), time.process_time()
    if options.pattern == "closed":
        records = await closed(caller, asks, int(load), on_done)
    else:
        burst_size = options.burst_size if options.pattern == "bursts" else 1
        due = arrivals(len(asks), load, burst_size=burst_size, seed=options.seed)
        records = await opened(caller, asks, due, on_done)
    share = (time.process_time() - cpu) / (time.perf_counter() - start)
    progress.clear()
    counted = records[options.warm_up :]
    if all(record.status == "failed" for record in counted):
        raise FailedError(
            f"{side.target}: none of {len(counted)} requests was answered; the first: {counted[0].detail}"
        )
    return Block(counted, share)


def ratios(ours: list[Block], theirs: list[Block]) -> dict[str, Any]:
    """Pair by pair; above 1 the first side is better: more tokens/s, a shorter TTFT p50.

    Raises FailedError for a block without a token.
    """
    rows = [[report([block.records], Slo()) for block in side] for side in (ours, theirs)]
    if not all(row["output_tokens"] and row["ttft_ms"]["p50"] for side in rows for row in side):
        raise FailedError("there is no ratio: one of the servers answered a block without a token")
    speed_a, speed_b = ([row["output_tokens"] / row["seconds"] for row in side] for side in rows)
    ttft_a, ttft_b = ([row["ttft_ms"]["p50"] for row in side] for side in rows)
    speed = Ratio(tuple(a / b for a, b in zip(speed_a, speed_b, strict=True)))
    ttft = Ratio(tuple(b / a for a, b in zip(ttft_a, ttft_b, strict=True)))
    return {"tokens_per_second_ratio": speed.json(), "ttft_p50_ratio": ttft.json()}


def summary(options: ServeOptions, results: list[dict[str, Any]]) -> str:
    """The results as tables; latencies are p50 / p90 / p99."""
    unit = "in flight" if options.pattern == "closed" else "requests/s"
    headers = [
        unit, "done", "rejected", "failed", "cached", "tokens/s", "goodput/s", "TTFT ms", "TPOT ms", "ITL ms", "e2e ms"
    ]  # fmt: skip
    head = f"{options.target}: {options.pattern}, {options.requests} requests a load, {options.warm_up} more to warm up"
    shared = f"{options.prefix_share} shared tokens + " if options.prefix_share else ""
    head += f", prompts {shared}{options.prompt_lengths}, answers {options.output_lengths}"
    head += "; cached: share of the prompts' tokens; latencies p50 / p90 / p99"
    text = f"{head}\n{table(headers, [_cells(result['load'], result) for result in results])}"
    if options.versus_target is None:
        return text
    names = ("tokens_per_second_ratio", "ttft_p50_ratio")
    rows = [[result["load"], *(_ratio(result[name]) for name in names)] for result in results]
    return "\n".join(
        [
            text,
            f"{options.versus_target}: the same in turns, {options.blocks} blocks each",
            table(headers, [_cells(result["load"], result["versus"]) for result in results]),
            f"{options.target} against it, pair by pair, p50 (min-max); above 1 it is better",
            table([unit, "tokens/s", "TTFT p50"], rows),
        ]
    )


def _cells(load: float, row: dict[str, Any]) -> list[Any]:
    cached = None if row["cached_tokens"] is None else row["cached_tokens"] / max(row["prompt_tokens"], 1)
    return [
        load, row["completed"], row["rejected"], row["failed"], cached, row["tokens_per_second"],
        row["goodput_requests_per_second"],
        *(_latencies(row[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")),
    ]  # fmt: skip


def _ratio(of: dict[str, Any]) -> str:
    return f"{of['ratio_p50']:.2f} ({of['ratio_min']:.2f}-{of['ratio_max']:.2f})"


def _latencies(of: dict[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in of.values())
