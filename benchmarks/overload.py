"""What the server adds to its engine, and what too much traffic does to it. Server and callers share this process.

- cost: tokens/s over gRPC with every slot live, over the bare engine's at the same lengths. Both in turns (A B A B).
- overload: requests at ten times the rate that the server can answer. Those accepted must be answered at the usual
  pace, after a wait that the queue's length bounds; the rest must be refused within milliseconds.
- reuse: decode steps between a caller's cancel and the first token of the request that waited for the slot.
"""

import asyncio
import statistics
import time
from typing import Any

import grpc

from ..engine_impl.loading import load_engine
from ..protos import orchestrator_pb2 as pb
from ..protos.orchestrator_pb2_grpc import OrchestratorStub
from ..server.config import ServerConfig
from ..server.errors import FailedError
from ..server.lifecycle import Serving
from .baselines.steppers import EngineStepper
from .load.caller import Record
from .load.grpc_caller import GrpcCaller
from .load.hosted import hosted, metric
from .load.loops import closed, opened
from .load.workload import LoadRequest, arrivals, lengths, make_requests
from .measure import machine
from .measure.stats import percentile
from .measure.table import Progress, table
from .options.flags import facts
from .options.overload import OverloadOptions

CALL_S = 600.0
REUSES = 10
"""Cancels of the reuse measure (count)."""

LATENCIES = {"ttft_ms": "TTFT ms p50 / p99", "tpot_ms": "TPOT ms p50 / p99", "e2e_ms": "e2e ms p50 / p99"}
"""Properties of a Record, and the table's headers."""


def run(options: OverloadOptions) -> dict[str, Any]:
    """All three. Raises FailedError when a sound request is not answered."""
    engine, params = load_engine(options.engine)
    load_average, progress = machine.warn_if_busy(), Progress()
    config = ServerConfig(port=0, grace_s=0, max_queued=options.max_queued, probe_interval_s=0)
    with hosted(engine, params, config) as serving:
        progress.show("cost ...")
        cost = measure_cost(engine, params, serving, options)
        progress.show("overload ...")
        overload = asyncio.run(measure_overload(serving, options, engine.sizes.slots))
        progress.show("reuse ...")
        reuse = asyncio.run(measure_reuse(serving, options, engine.sizes.slots))
    progress.clear()
    result = {"slots": engine.sizes.slots, "cost": cost, "overload": overload, "reuse": reuse}
    print(_summary(result, options))
    where = machine.describe(machine.use_threads(None)) | {"load_average": load_average}
    return (
        {
            "model": engine.model_name,
            "cache_length": engine.sizes.cache_length,
            "plan": facts(options) | {"ids": options.ids},
        }
        | result
        | where
    )


def measure_cost(engine: Any, params: Any, serving: Serving, options: OverloadOptions) -> dict[str, Any]:
    """Decode alone: no prefill is timed on either side."""
    (ask,) = _asks(options, 1)
    bare = EngineStepper(engine, params)
    slots, bare_speeds, served_speeds = engine.sizes.slots, [], []
    for _ in range(options.pairs):
        bare.fill([ask.prompt_ids] * slots)
        bare.block(2)
        bare_speeds.append(slots * 1000 / statistics.fmean(bare.block(options.steps).step_ms))
        served_speeds.append(asyncio.run(_served_speed(serving, ask, slots, options.steps)))
    ratios = [served / alone for served, alone in zip(served_speeds, bare_speeds, strict=True)]
    return {
        "bare_tokens_per_second": round(statistics.median(bare_speeds), 1),
        "served_tokens_per_second": round(statistics.median(served_speeds), 1),
        "ratio_p50": round(statistics.median(ratios), 3),
        "ratio_pairs": [round(ratio, 3) for ratio in ratios],
    }


async def _served_speed(serving: Serving, ask: LoadRequest, slots: int, steps: int) -> float:
    """Tokens a second while every slot is live: between the last first token and the first last one."""
    content = pb.DecodeRequest.TokenContent(token_ids=ask.prompt_ids)
    request = pb.DecodeRequest(token_content=content, max_tokens=steps + 2 * slots, ignore_eos=True)

    async def listen(stub: OrchestratorStub) -> list[tuple[float, int]]:
        replies: Any = stub.Decode(request, timeout=CALL_S)
        return [(time.perf_counter(), len(reply.stream_content.samples[0].token_ids)) async for reply in replies]

    async with grpc.aio.insecure_channel(serving.address) as channel:
        stub = OrchestratorStub(channel)
        heard = await asyncio.gather(*(listen(stub) for _ in range(slots)))
    begin, end = max(times[0][0] for times in heard), min(times[-1][0] for times in heard)
    return sum(tokens for times in heard for at, tokens in times if begin < at <= end) / (end - begin)


async def measure_overload(serving: Serving, options: OverloadOptions, slots: int) -> dict[str, Any]:
    """First as many at once as there are slots, which gives the rate; then `factor` times that rate."""
    asks, more = (_asks(options, options.requests, block) for block in range(2))
    async with GrpcCaller(serving.address, CALL_S) as caller:
        usual = await closed(caller, asks, slots, lambda record: None)
        rate = len(usual) / _seconds(usual)
        due = arrivals(len(more), options.factor * rate, burst_size=1, seed=options.seed)
        over = await opened(caller, more, due, lambda record: None)
    failed = [record.detail for record in [*usual, *over] if record.status == "failed"]
    if failed:
        raise FailedError(f"{len(failed)} requests failed; the first: {failed[0]}")
    refused = [record.e2e_ms for record in over if record.status == "rejected"]
    return {
        "answerable_requests_per_second": round(rate, 2),
        "offered_requests_per_second": round(options.factor * rate, 2),
        "usual": _answered(usual),
        "over": _answered(over),
        "refused": len(refused),
        "refused_ms": {f"p{q}": _rounded(percentile(refused, q)) for q in (50, 99)},
    }


async def measure_reuse(serving: Serving, options: OverloadOptions, slots: int) -> dict[str, Any]:
    """Every slot is taken and one request waits; a caller of the others leaves."""
    (ask,) = _asks(options, 1)
    content = pb.DecodeRequest.TokenContent(token_ids=ask.prompt_ids)
    long = pb.DecodeRequest(token_content=content, max_tokens=options.steps + 2 * slots, ignore_eos=True)
    steps = []
    async with grpc.aio.insecure_channel(serving.address) as channel:
        stub = OrchestratorStub(channel)
        for _ in range(REUSES):
            calls: list[Any] = [stub.Decode(long, timeout=CALL_S) for _ in range(slots)]
            for call in calls:
                await call.read()
            waiting: Any = stub.Decode(long, timeout=CALL_S)
            while not metric(serving, "queue_depth"):
                await asyncio.sleep(0.001)
            before = metric(serving, "decode_step_seconds_count")
            calls[0].cancel()
            await waiting.read()
            steps.append(int(metric(serving, "decode_step_seconds_count") - before))
            for call in [*calls, waiting]:
                call.cancel()
            while metric(serving, "slots_in_use"):
                await asyncio.sleep(0.001)
    return {"steps_p50": statistics.median(steps), "steps_max": max(steps)}


def _asks(options: OverloadOptions, count: int, block: int = 0) -> list[LoadRequest]:
    prompt, answer = (lengths(f"fixed:{n}", 0) for n in (options.prompt_tokens, options.answer_tokens))
    return make_requests(count, prompt, answer, ids=options.ids, max_length=None, seed=options.seed, block=block)


def _seconds(records: list[Record]) -> float:
    return max(record.end for record in records) - min(record.due for record in records)


def _answered(records: list[Record]) -> dict[str, Any]:
    done = [record for record in records if record.status == "completed"]
    row: dict[str, Any] = {
        "answered": len(done),
        "tokens_per_second": round(sum(record.tokens for record in done) / _seconds(records), 1),
    }
    for name in LATENCIES:
        values = [value for record in done if (value := getattr(record, name)) is not None]
        row[name] = {f"p{q}": _rounded(percentile(values, q)) for q in (50, 99)}
    return row


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _summary(result: dict[str, Any], options: OverloadOptions) -> str:
    cost, overload, reuse = result["cost"], result["overload"], result["reuse"]
    refused = overload["refused_ms"]
    rows = [
        [name, load, row["answered"], refusals, row["tokens_per_second"], *(_pair(row[key]) for key in LATENCIES)]
        for name, load, row, refusals in (
            ("usual", overload["answerable_requests_per_second"], overload["usual"], 0),
            (
                f"{options.factor:g} times that",
                overload["offered_requests_per_second"],
                overload["over"],
                overload["refused"],
            ),
        )
    ]
    return "\n".join(
        [
            f"{result['slots']} slots, prompts of {options.prompt_tokens} tokens, answers of up to "
            f"{options.answer_tokens}",
            f"over gRPC {cost['served_tokens_per_second']} tokens/s, the bare engine "
            f"{cost['bare_tokens_per_second']}: {cost['ratio_p50']} (pairs {cost['ratio_pairs']})",
            "",
            table(["load", "requests/s", "answered", "refused", "tokens/s", *LATENCIES.values()], rows),
            f"refused after {_pair(refused)} ms (p50 / p99)",
            f"a cancelled slot answers the next request after {reuse['steps_p50']:g} steps (p50), "
            f"{reuse['steps_max']} at most",
        ]
    )


def _pair(of: dict[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in of.values())
