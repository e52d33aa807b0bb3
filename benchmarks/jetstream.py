"""JetStream's orchestrator and ours, each in a server of its own over the same engine, under the same load in turns.

A client on JetStream's wire keeps so many requests in flight at one server while the other is idle; then they change
places (A B A B). Before that the two must answer alike. After it, each server is filled with long answers, one more
request waits for a slot, and one of the running calls is cancelled: how long until the waiting one's first token?
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from ..protos import orchestrator_pb2 as pb
from ..server.child import server
from ..server.errors import FailedError
from ..server.grpc.service import JETSTREAM_SERVICE
from .load.caller import Record
from .load.grpc_caller import GrpcCaller
from .load.loops import closed
from .load.report import Slo, report
from .load.workload import LoadRequest, make_requests
from .measure.machine import warn_if_busy
from .measure.stats import percentile
from .measure.table import Progress, table
from .options.flags import facts
from .options.jetstream import JetStreamOptions

SIDES = {"ours": (), "jetstream": ("--orchestrator", "jetstream")}
IDS = (300, 1000)
CHECKED = 4
"""Requests whose answers are compared (requests)."""
SETTLE_S = 0.5
"""Time that a request gets to reach the queue (seconds)."""


@dataclass
class Side:
    """One of the two servers, and what it did."""

    target: str
    blocks: list[list[Record]] = field(default_factory=list)
    reuse_ms: list[float] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Tokens/s of the median block; latencies of all blocks' requests."""
        speeds = [report([block], Slo())["tokens_per_second"] for block in self.blocks]
        whole = report(self.blocks, Slo())
        kept = ("requests", "completed", "failed", "first_failure", "ttft_ms", "tpot_ms", "e2e_ms")
        return {
            "tokens_per_second": percentile(speeds, 50),
            "tokens_per_second_blocks": speeds,
            **{name: whole[name] for name in kept},
            "cancelled_slot_reuse_ms": {"p50": percentile(self.reuse_ms, 50), "all": self.reuse_ms},
        }


class JetStreamCaller(GrpcCaller):
    """Calls JetStream's method path, which both servers have, with what its clients send."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.decode = self._decode = self._channel.unary_stream(
            f"/{JETSTREAM_SERVICE}/Decode", pb.DecodeRequest.SerializeToString, pb.DecodeResponse.FromString
        )
        return self

    def message(self, ask: LoadRequest) -> pb.DecodeRequest:
        return message(ask.prompt_ids, ask.max_tokens)


def run(options: JetStreamOptions) -> dict[str, Any]:
    """{"ours": numbers, "jetstream": numbers, "speedup": the blocks' ratios, ...the flags}.

    Raises FailedError when the two do not answer alike, or do not answer.
    """
    warn_if_busy()
    with contextlib.ExitStack() as servers:
        sides = {name: Side(servers.enter_context(server(options.engine, *flags))[1]) for name, flags in SIDES.items()}
        asyncio.run(measure(options, sides))
    results = {name: side.result() for name, side in sides.items()}
    speeds = [results[name]["tokens_per_second_blocks"] for name in ("ours", "jetstream")]
    ratios = [round(ours / theirs, 4) for ours, theirs in zip(*speeds, strict=True)]
    print(summary(options, results, ratios))
    speedup = {"p50": percentile(ratios, 50), "pairs": ratios}
    return facts(options) | {"engine": asdict(options.engine)} | results | {"speedup": speedup, "same_tokens": True}


async def measure(options: JetStreamOptions, sides: dict[str, Side]) -> None:
    """Fills in the sides."""
    checked, *asks_of_pair = (_asks(options, block) for block in range(1 + options.pairs))
    progress = Progress()
    async with contextlib.AsyncExitStack() as callers:
        made = [JetStreamCaller(side.target, options.timeout_s) for side in sides.values()]
        by_name = {name: await callers.enter_async_context(caller) for name, caller in zip(sides, made, strict=True)}
        await check_alike(by_name, checked[:CHECKED])
        for pair, asks in enumerate(asks_of_pair):
            for name, caller in by_name.items():
                records = await closed(caller, asks, options.in_flight, counted(progress, len(asks), f"{name}, {pair}"))
                if not any(record.status == "completed" for record in records):
                    raise FailedError(f"{name} answered none of {len(records)} requests: {records[0].detail}")
                sides[name].blocks.append(records)
        for index in range(options.cancels):
            for name, caller in by_name.items():
                progress.show(f"cancel {index}: {name}")
                sides[name].reuse_ms.append(await reuse_ms(caller, options))
    progress.clear()


def _asks(options: JetStreamOptions, block: int) -> list[LoadRequest]:
    """New prompts in each block: one of the servers caches prefixes."""
    return make_requests(
        options.requests,
        lambda rng, index: options.prompt_tokens,
        lambda rng, index: options.output_tokens,
        ids=IDS,
        max_length=None,
        seed=options.seed,
        block=block,
    )


def counted(progress: Progress, total: int, text: str) -> Callable[[Record], None]:
    """Shows how many are done."""
    done: list[Record] = []

    def on_done(record: Record) -> None:
        done.append(record)
        progress.bar(len(done), total, text)

    return on_done


async def check_alike(callers: dict[str, JetStreamCaller], asks: list[LoadRequest]) -> None:
    """Also warms both up. Raises FailedError unless all answers are the same, token by token."""
    answers = {name: [await token_ids(caller, ask) for ask in asks] for name, caller in callers.items()}
    for ask, ours, theirs in zip(asks, *answers.values(), strict=True):
        if ours != theirs:
            raise FailedError(f"{ask.prompt_ids[:8]}... is answered {ours} by us and {theirs} under JetStream")


async def token_ids(caller: JetStreamCaller, ask: LoadRequest) -> list[int]:
    """One whole answer."""
    return [
        token_id
        async for reply in caller.decode(message(ask.prompt_ids, ask.max_tokens))
        for token_id in reply.stream_content.samples[0].token_ids
    ]


async def reuse_ms(caller: JetStreamCaller, options: JetStreamOptions) -> float:
    """From the cancel of one of the running answers to the first token of the request that waits for its slot (ms)."""
    shape = (options.slots + 1, options.prompt_tokens)
    prompts = np.random.default_rng(options.seed).integers(*IDS, shape).tolist()
    running = [caller.decode(message(prompt, options.cancelled_tokens)) for prompt in prompts[1:]]
    for call in running:
        await call.read()
    waiting = caller.decode(message(prompts[0], 2))  # one token alone would need no slot with us
    first = asyncio.ensure_future(waiting.read())
    await asyncio.sleep(SETTLE_S)
    if first.done():
        raise FailedError(
            f"no request waits: {options.engine.slots} answers of {options.cancelled_tokens} tokens end too soon"
        )
    start = time.perf_counter()
    running[0].cancel()
    await first
    elapsed_ms = (time.perf_counter() - start) * 1000
    for call in running[1:]:
        with contextlib.suppress(Exception):
            async for _ in call:  # JetStream decodes what is cancelled to its end: let all end by themselves
                pass
    return round(elapsed_ms, 3)


def message(prompt_ids: list[int], max_tokens: int) -> pb.DecodeRequest:
    """What JetStream's clients send too."""
    return pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=prompt_ids), max_tokens=max_tokens)


def summary(options: JetStreamOptions, results: dict[str, dict[str, Any]], ratios: list[float]) -> str:
    """The results as a table."""
    headers = ["orchestrator", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "cancelled slot reused ms"]
    rows = [
        [
            name,
            result["tokens_per_second"],
            result["ttft_ms"]["p50"],
            result["ttft_ms"]["p99"],
            result["tpot_ms"]["p50"],
            result["cancelled_slot_reuse_ms"]["p50"],
        ]
        for name, result in results.items()
    ]
    engine = options.engine
    head = (
        f"{engine.model}, {engine.slots} slots x {engine.cache_length}: {options.in_flight} requests in flight, "
        f"prompts of {options.prompt_tokens} and answers of {options.output_tokens} tokens, {options.pairs} blocks of "
        f"{options.requests} requests each, in turns; cancelled: one of {engine.slots} answers of "
        f"{options.cancelled_tokens} tokens"
    )
    return f"{head}\n{table(headers, rows)}\nours / jetstream, tokens/s, pair by pair: {', '.join(map(str, ratios))}"
