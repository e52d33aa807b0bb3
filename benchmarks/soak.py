"""Thousands of mixed requests over real gRPC: answers read to the end, cancelled, out of time, cut off with their
connection, and requests that make no sense. Everything is drawn from one seed.

What must hold: every answer is the one that its prompt has when it is alone, or a beginning of it, whether the request
was pre-empted or not; every call ends once, with a status that its kind may have; at the end every slot is free, no
page is anybody's but the cached prefixes', and the queue is empty; and memory, threads and file descriptors are those
after a third of the requests, when all pools and caches are filled.
"""

import asyncio
import gc
import os
import random
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ..engine_impl.loading import load_engine
from ..protos import orchestrator_pb2 as pb
from ..protos.orchestrator_pb2_grpc import OrchestratorStub
from ..server.errors import FailedError
from ..server.grpc.service import RETRY_AFTER
from ..server.lifecycle import Serving
from ..server.observe.metrics import Outcome
from .load.hosted import hosted, metric
from .load.hostile_caller import HostileCaller
from .load.hostile_inputs import INPUTS
from .measure import machine
from .measure.table import Progress, table
from .options.flags import facts
from .options.soak import SoakOptions

EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
OK, FULL = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
CANCELLED, LATE = grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED
BAD = grpc.StatusCode.INVALID_ARGUMENT

KINDS: dict[str, tuple[float, set[grpc.StatusCode]]] = {
    # kind: (share, how it may end)
    "whole": (0.55, {OK, FULL}),
    "cancelled": (0.2, {OK, FULL, CANCELLED}),
    "late": (0.1, {OK, FULL, LATE}),
    "cut off": (0.05, {OK, FULL, CANCELLED}),
    "senseless": (0.1, {BAD, FULL}),  # a full queue is told before the prompt is read
}
HOSTILE, REFUSED = "hostile", {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "400", "413", "429"}
"""One more kind, and what it may be told."""
QUIET_S = 30.0
"""How long the server may take to be idle after the last call (seconds)."""
HELD = ("slots_in_use", "queue_depth")
"""Metrics that are 0 when nobody is on the server; so is the number of live pages."""
CALL_S = 300.0
BACKOFF_S = (0.05, 5.0)
"""A caller that was refused waits as long as the server says, within these (seconds), before its next request."""
LATE_MS = (1, 200)
MAX_GROWTH = {"memory_mib": 64.0, "threads": 4.0, "files": 8.0}
"""What may come on top between the first third and the end: a few late pool threads, an allocator's arenas."""


@dataclass
class Heard:
    """What one call brought."""

    samples: list[list[int]]
    ends: list[int]
    """Finish reasons that each sample has had (count)."""
    usages: int = 0
    code: grpc.StatusCode | None = None
    retry_after_s: float = 0.0
    """What a refusal advised."""


@dataclass
class Tally:
    """What became of the requests."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind and status."""
    faults: list[str] = field(default_factory=list)
    tokens: int = 0


def run(options: SoakOptions) -> dict[str, Any]:
    """Of a server in this process. Raises as load_engine and measure do."""
    with hosted(*load_engine(options.engine), options.server) as serving:
        return measure(serving, options)


def measure(serving: Serving, options: SoakOptions) -> dict[str, Any]:
    """The numbers; `faults` is empty if all is well. Raises FailedError when the server answers nothing at all."""
    return asyncio.run(_measure(serving, options))


async def _measure(serving: Serving, options: SoakOptions) -> dict[str, Any]:
    progress = Progress()
    async with grpc.aio.insecure_channel(serving.address) as channel, _hostile(serving, options) as hostile:
        soak = Soak(serving, options, channel, hostile)
        await soak.learn()
        before, start, pages = _outcomes(serving), time.perf_counter(), page_counts(serving)
        numbers = iter(range(options.requests))

        async def work(until: int) -> None:
            while time.perf_counter() - start < options.max_seconds:
                if (number := next(numbers, None)) is None:
                    return
                await soak.one(number)
                progress.bar(number + 1, options.requests, f"{len(soak.tally.faults)} faults")
                if number >= until:
                    return

        async def batch(until: int) -> dict[str, float]:
            await asyncio.gather(*(work(until) for _ in range(options.in_flight)))
            await soak.quiet()
            return footprint()

        first = await batch(options.requests // 3)
        last = await batch(options.requests)
        progress.clear()
        seconds = time.perf_counter() - start
        await soak.check_after(before, sum(pages.values()))
    tally = soak.tally
    preemptions = int(metric(serving, "preemptions_total"))
    if preemptions < options.min_preemptions:
        tally.faults.append(
            f"{preemptions} requests were pre-empted, not the {options.min_preemptions} asked for; lower --cache-tokens"
        )
    growth = {name: round(last[name] - first[name], 1) for name in first}
    tally.faults += [f"{name} grew by {growth[name]}" for name in growth if growth[name] > MAX_GROWTH[name]]
    done = sum(tally.ends.values())
    result = {
        "requests": done,
        "seconds": round(seconds, 2),
        "requests_per_second": round(done / seconds, 1),
        "tokens": tally.tokens,
        "preemptions": preemptions,
        "prefix_cached_tokens": int(metric(serving, "prefix_cached_tokens_total")),
        "pages": page_counts(serving),
        "ends": {
            kind: {code: n for (k, code), n in sorted(tally.ends.items()) if k == kind}
            for kind in (*KINDS, *[HOSTILE] * (options.hostile > 0))
        },
        "first": first,
        "last": last,
        "growth": growth,
        "faults": tally.faults,
    }
    print(_summary(result))
    return {"plan": facts(options) | {"ids": options.ids}} | result | machine.describe(machine.use_threads(None))


class Soak:
    """The requests of one run against one server."""

    def __init__(
        self, serving: Serving, options: SoakOptions, channel: grpc.aio.Channel, hostile: HostileCaller | None
    ) -> None:
        self._serving, self._options, self._hostile = serving, options, hostile
        self._stub = OrchestratorStub(channel)
        draw = random.Random(options.seed)
        self._prompts = [
            [draw.randrange(*options.ids) for _ in range(draw.randint(1, options.prompt_tokens))]
            for _ in range(options.prompts)
        ]
        self._most_samples = 2 if metric(serving, "slots") > 1 else 1
        self._answers: list[list[list[int]]] = []  # by prompt, by sample
        self.tally = Tally()

    async def learn(self) -> None:
        """Every prompt's whole answer, alone on the server."""
        for prompt in self._prompts:
            request = _request(prompt, self._options.answer_tokens, self._most_samples)
            heard = await self._listen(self._stub.Decode(request, timeout=CALL_S), self._most_samples)
            if heard.code is not OK:
                raise FailedError(f"the server answers {heard.code} to a sound request")
            self._answers.append(heard.samples)

    async def one(self, number: int) -> None:
        """One request of a random kind, from its sending to its end."""
        draw = random.Random(f"{self._options.seed} {number}")
        if self._hostile is not None and draw.random() < self._options.hostile:
            told = await self._hostile.send(name := draw.choice(list(INPUTS)))
            self.tally.ends[HOSTILE, told] += 1
            if told not in REFUSED:
                self.tally.faults.append(f"request {number}, {name}: {told}")
            return
        kind = draw.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
        if kind == "senseless":
            heard = await self._senseless(draw)
        else:
            heard = await self._sound(kind, draw)
        code = heard.code
        self.tally.ends[kind, code.name if code else "NONE"] += 1
        if code is FULL:
            await asyncio.sleep(min(max(heard.retry_after_s, BACKOFF_S[0]), BACKOFF_S[1]))
        if code not in KINDS[kind][1]:
            self.tally.faults.append(f"request {number}, {kind}: {code}")

    async def _sound(self, kind: str, draw: random.Random) -> Heard:
        index = draw.randrange(len(self._prompts))
        max_tokens = draw.randint(1, self._options.answer_tokens)
        samples = self._most_samples if draw.random() < 0.1 else 1
        request = _request(self._prompts[index], max_tokens, samples)
        leave_after = draw.randint(0, 4) if kind in ("cancelled", "cut off") else None
        timeout_s = draw.randint(*LATE_MS) / 1000 if kind == "late" else CALL_S
        if kind == "cut off":
            # Its own connection, which goes away under the call.
            async with grpc.aio.insecure_channel(
                self._serving.address, options=[("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                call = OrchestratorStub(channel).Decode(request, timeout=timeout_s)
                heard = await self._listen(call, samples, leave_after, leave=lambda: channel.close(None))
        else:
            call = self._stub.Decode(request, timeout=timeout_s)
            heard = await self._listen(call, samples, leave_after)
        self._judge(heard, [answer[:max_tokens] for answer in self._answers[index]])
        return heard

    async def _senseless(self, draw: random.Random) -> Heard:
        good, tokens = self._prompts[0], pb.DecodeRequest.TokenContent
        requests = [
            _request(good, 0),
            _request(good, -draw.randint(1, 2**31)),
            _request(good, 2**31 - 1),
            _request([], 1),
            _request([-1], 1),
            _request([2**31 - 1], 1),
            _request(good * 1000, 1),
            _request(good, 1, samples=10_000),
            pb.DecodeRequest(max_tokens=1),
            pb.DecodeRequest(max_tokens=1, messages=pb.DecodeRequest.Chat()),
            pb.DecodeRequest(max_tokens=1, token_content=tokens(token_ids=good), temperature=-1.0),
            pb.DecodeRequest(max_tokens=1, token_content=tokens(token_ids=good), temperature=float("nan")),
            pb.DecodeRequest(max_tokens=1, token_content=tokens(token_ids=good), top_p=1.5),
            pb.DecodeRequest(max_tokens=1, token_content=tokens(token_ids=good), lora_adapter_id="none"),
        ]
        return await self._listen(self._stub.Decode(draw.choice(requests), timeout=CALL_S), 1)

    async def _listen(self, call: Any, samples: int, leave_after: int | None = None, leave: Any = None) -> Heard:
        """Reads a call to its end, or leaves it after so many messages."""
        heard, messages = Heard([[] for _ in range(samples)], [0] * samples), 0
        try:
            while messages != leave_after and (reply := await call.read()) is not EOF:
                messages += 1
                heard.usages += reply.HasField("usage")
                for index, sample in enumerate(reply.stream_content.samples):
                    heard.samples[index] += sample.token_ids
                    heard.ends[index] += bool(sample.finish_reason)
                    self.tally.tokens += len(sample.token_ids)
            if messages == leave_after:
                await leave() if leave else call.cancel()
            heard.code = await call.code()
        except grpc.aio.AioRpcError as error:
            heard.code = error.code()
            heard.retry_after_s = float(dict(error.trailing_metadata() or ()).get(RETRY_AFTER, 0)) / 1000
        except asyncio.CancelledError:  # how grpc tells of a call that we left
            heard.code = CANCELLED
        return heard

    def _judge(self, heard: Heard, answers: list[list[int]]) -> None:
        for tokens, ends, answer in zip(heard.samples, heard.ends, answers, strict=False):
            if tokens != answer[: len(tokens)]:
                self.tally.faults.append(f"{tokens} is no beginning of {answer}")
            if ends > 1 or heard.usages > 1:
                self.tally.faults.append(f"a sample ended {ends} times, its request {heard.usages} times")
            if heard.code is OK and (tokens != answer or ends != 1 or heard.usages != 1):
                self.tally.faults.append(f"OK, and {tokens} with {ends} ends is not the whole of {answer}")
            if heard.code is FULL and tokens:
                self.tally.faults.append("a refused request had tokens")

    async def quiet(self) -> None:
        """Until nothing waits and nothing runs."""
        end = time.perf_counter() + QUIET_S
        while any(taken := (*(metric(self._serving, of) for of in HELD), page_counts(self._serving)["live"])):
            if time.perf_counter() > end:
                slots, places, pages = taken
                self.tally.faults.append(
                    f"{slots:.0f} slots, {places:.0f} places in the queue and {pages:.0f} pages are still taken "
                    f"{QUIET_S:g} s after the last call"
                )
                return
            await asyncio.sleep(0.02)

    async def check_after(self, before: dict[str, float], pages: int) -> None:
        """The server's own account must fit what was heard and the pool's `pages`, and it must still serve."""
        now = page_counts(self._serving)
        if sum(now.values()) != pages:
            self.tally.faults.append(f"of {pages} pages {now} are left")
        counted = {name: value - before[name] for name, value in _outcomes(self._serving).items()}
        heard: Counter[str] = Counter()
        for (_, code), number in self.tally.ends.items():
            heard[code] += number
        # Who leaves does not hear how it ended: the server may count more.
        for outcome, code in ((Outcome.OK, OK), (Outcome.REJECTED, FULL)):
            if counted[outcome.value] < heard[code.name]:
                self.tally.faults.append(
                    f"the server counts {counted[outcome.value]:.0f} {outcome.value}, the callers {heard[code.name]}"
                )
        if failed := counted[Outcome.FAILED.value]:
            self.tally.faults.append(f"the engine failed {failed:.0f} requests")
        if late := metric(self._serving, "compilations_after_warmup_total"):
            self.tally.faults.append(f"{late:.0f} programs were compiled after the warm-up")
        answers, self._answers = self._answers, []
        await self.learn()
        if answers != self._answers:
            self.tally.faults.append("the answers are others than at the beginning")


def _hostile(serving: Serving, options: SoakOptions) -> Any:
    if not options.hostile:
        return nullcontext()
    assert serving.http_address is not None
    return HostileCaller(serving.address, serving.http_address, options.input_bytes, CALL_S)


def _request(prompt: list[int], max_tokens: int, samples: int = 1) -> pb.DecodeRequest:
    content = pb.DecodeRequest.TokenContent(token_ids=prompt)
    return pb.DecodeRequest(token_content=content, max_tokens=max(max_tokens, -(2**31)), num_samples=samples)


def _outcomes(serving: Serving) -> dict[str, float]:
    return {outcome.value: metric(serving, "requests_total", outcome=outcome.value) for outcome in Outcome}


def page_counts(serving: Serving) -> dict[str, int]:
    """How many pages are free, live and cached now."""
    return {state: int(metric(serving, "pages", state=state)) for state in ("free", "live", "cached")}


def footprint() -> dict[str, float]:
    """Of this process, server and callers together."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "threads": float(status["Threads"]),
        "files": float(len(os.listdir("/proc/self/fd"))),
    }


def _summary(result: dict[str, Any]) -> str:
    codes = sorted({code for ends in result["ends"].values() for code in ends})
    rows = [[kind, *(ends.get(code, 0) for code in codes)] for kind, ends in result["ends"].items()]
    held = [[name, result["first"][name], result["last"][name], result["growth"][name]] for name in result["growth"]]
    faults = [f"FAULT: {fault}" for fault in result["faults"][:20]] or ["no faults"]
    return "\n".join(
        [
            f"{result['requests']} requests in {result['seconds']} s, {result['tokens']} tokens, "
            f"{result['preemptions']} pre-empted, {result['prefix_cached_tokens']} tokens from cached prefixes",
            table(["kind", *codes], rows),
            "",
            table(["of the process", "after a third", "at the end", "growth"], held),
            "",
            *faults,
        ]
    )
