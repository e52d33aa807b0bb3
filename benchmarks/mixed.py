"""Streams decode, and long prompts arrive: how long does a reader wait for a stream's next message?

In a block some streams run; as soon as each has brought LEAD messages, the prompts are sent at one moment. Every block
has prompts of its own. Two servers take turns (A B A B).
"""

import asyncio
import itertools
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from ..server.errors import FailedError
from .load.caller import Caller, Record
from .load.workload import LoadRequest, lengths, make_requests
from .measure.machine import describe_client
from .measure.stats import Ratio
from .measure.table import Progress, table
from .options.mixed import MixedOptions
from .sides import callers_of

LEAD = 8
"""Messages that each stream brings before the prompts are sent (messages)."""
POLL_S = 0.002
WARM_UP_TOKENS = 2

NUMBERS = {
    "longest_gap_ms": "longest gap of a stream, ms",
    "usual_gap_ms": "its gap before the prompts (p50), ms",
    "first_tokens_s": "all prompts' first tokens after, s",
    "answered_s": "all prompts answered after, s",
    "tokens_per_second": "tokens/s, streams and prompts",
}
"""Properties of a Block, and the table's rows."""


class Asks(NamedTuple):
    """What is sent in one block."""

    streams: list[LoadRequest]
    prompts: list[LoadRequest]


class Block(NamedTuple):
    """What became of it."""

    streams: list[Record]
    prompts: list[Record]

    @property
    def longest_gap_ms(self) -> float:
        """Between two messages of one stream, of which the second came after the prompts were sent."""
        return max((gap for end, gap in self._gaps() if end > self._sent), default=0.0) * 1000

    @property
    def usual_gap_ms(self) -> float:
        """The median before that."""
        return float(np.median([gap for end, gap in self._gaps() if end <= self._sent])) * 1000

    @property
    def first_tokens_s(self) -> float:
        """From the prompts' sending until each has its first token."""
        return max(record.token_times[0] for record in self.prompts) - self._sent

    @property
    def answered_s(self) -> float:
        """From the prompts' sending until each is answered whole."""
        return max(record.end for record in self.prompts) - self._sent

    @property
    def tokens_per_second(self) -> float:
        """Of all answers, from the first stream's sending to the last answer's end."""
        records = [*self.streams, *self.prompts]
        seconds = max(record.end for record in records) - min(record.due for record in records)
        return sum(record.tokens for record in records) / seconds

    @property
    def outlasts(self) -> bool:
        """Whether a stream ran until every prompt had its first token: else none could stall any longer."""
        return max(record.end for record in self.streams) - self._sent >= self.first_tokens_s

    @property
    def _sent(self) -> float:
        return self.prompts[0].due

    def _gaps(self) -> list[tuple[float, float]]:
        """(when it ended, how long it was), seconds."""
        times = [record.token_times for record in self.streams]
        return [(after, after - before) for of in times for before, after in itertools.pairwise(of)]


def run(options: MixedOptions) -> dict[str, Any]:
    """{number: {"p50", "blocks"}, ...}; of two servers also the second one's under "versus", and "ratios".

    Raises UnavailableError when nobody answers, FailedError when a request is not answered.
    """
    client = describe_client()
    blocks = asyncio.run(run_blocks(options))
    for side, its_blocks in zip(options.sides, blocks, strict=True):
        if not all(block.outlasts for block in its_blocks):
            print(
                f"warning: {side.target}: its streams ended before the prompts' first tokens, so that they may have "
                f"stalled less than they would; raise --stream-tokens {options.stream_tokens}",
                file=sys.stderr,
            )
    rows = [{name: _numbers([getattr(block, name) for block in of_side]) for name in NUMBERS} for of_side in blocks]
    result = rows[0] if len(rows) == 1 else rows[0] | {"versus": rows[1], "ratios": ratios(*rows)}
    print(summary(options, result))
    return options.facts() | {"client": client} | result


async def run_blocks(options: MixedOptions) -> list[list[Block]]:
    """By side."""
    progress = Progress()
    blocks: list[list[Block]] = [[] for _ in options.sides]
    async with callers_of(options, ignore_eos=True) as callers:
        for caller in callers:
            await warm_up(caller, asks_of(options, options.blocks))
        for number in range(options.blocks):
            asks = asks_of(options, number)
            for side, caller, its_blocks in zip(options.sides, callers, blocks, strict=True):
                progress.show(f"{side.target}, block {number + 1} of {options.blocks} ...")
                its_blocks.append(await run_block(caller, asks))
    progress.clear()
    return blocks


def asks_of(options: MixedOptions, number: int) -> Asks:
    """Of one block."""
    kinds = (
        (options.streams, options.stream_prompt_tokens, options.stream_tokens),
        (options.prompts, options.prompt_tokens, options.answer_tokens),
    )
    return Asks(
        *(
            make_requests(
                count, lengths(f"fixed:{prompt}", 0), lengths(f"fixed:{answer}", 1), ids=options.ids,
                max_length=None, seed=options.seed, block=2 * number + kind,
            )
            for kind, (count, prompt, answer) in enumerate(kinds)
        )
    )  # fmt: skip


async def warm_up(caller: Caller, asks: Asks) -> None:
    """A short answer to one request of each kind."""
    for ask in (asks.streams[0], asks.prompts[0]):
        record = Record(due=time.perf_counter())
        await caller.call(LoadRequest(ask.prompt_ids, WARM_UP_TOKENS), record)
        check([record])


async def run_block(caller: Caller, asks: Asks) -> Block:
    """Raises FailedError unless every request is answered, and the prompts come while all streams run."""
    streams = [Record(due=time.perf_counter()) for _ in asks.streams]
    calls = [asyncio.ensure_future(caller.call(*of)) for of in zip(asks.streams, streams, strict=True)]
    while any(len(record.token_times) < LEAD and not call.done() for record, call in zip(streams, calls, strict=True)):
        await asyncio.sleep(POLL_S)
    if any(call.done() for call in calls):
        check(streams)
        raise FailedError(f"a stream ended before all had {LEAD} messages; raise --stream-tokens")
    prompts = [Record(due=time.perf_counter()) for _ in asks.prompts]
    await asyncio.gather(*calls, *(caller.call(*of) for of in zip(asks.prompts, prompts, strict=True)))
    check([*streams, *prompts])
    block = Block(streams, prompts)
    if not block.longest_gap_ms:
        raise FailedError("no stream had a message after the prompts were sent; raise --stream-tokens")
    return block


def check(records: list[Record]) -> None:
    """Raises FailedError unless all that have ended were answered."""
    if unanswered := [record for record in records if record.end and record.status != "completed"]:
        raise FailedError(f"{len(unanswered)} of {len(records)} requests were not answered: {unanswered[0].detail}")


def _numbers(blocks: list[float]) -> dict[str, Any]:
    return {"p50": round(float(np.median(blocks)), 3), "blocks": [round(value, 3) for value in blocks]}


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Block by block; above 1 the first side is better: shorter times, more tokens/s."""
    found = {}
    for name in NUMBERS:
        pairs = zip(ours[name]["blocks"], theirs[name]["blocks"], strict=True)
        is_speed = name == "tokens_per_second"
        found[name] = Ratio(tuple(a / b if is_speed else b / a for a, b in pairs)).json()
    return found


def summary(options: MixedOptions, result: dict[str, Any]) -> str:
    """A row for each number, a column for each server."""
    head = (
        f"{options.prompts} prompts of {options.prompt_tokens} tokens (answers of {options.answer_tokens}) while "
        f"{options.streams} streams decode (answers of {options.stream_tokens})"
    )
    headers = ["p50 of the blocks", *(side.target for side in options.sides)]
    columns = [result, result["versus"]] if "versus" in result else [result]
    rows = [[title, *(column[name]["p50"] for column in columns)] for name, title in NUMBERS.items()]
    if "ratios" in result:
        headers.append("ratio (min-max), above 1 the first is better")
        for row, of in zip(rows, result["ratios"].values(), strict=True):
            row.append(f"{of['ratio_p50']:.2f} ({of['ratio_min']:.2f}-{of['ratio_max']:.2f})")
    return f"{head}\n{table(headers, rows)}"
