"""Speculation on and off, each in a server of its own on the same model, under the same load in turns over gRPC.

Three kinds of answers: a paragraph that the model is asked to write once more with one word changed; random tokens that
go on at a high temperature, where there is nothing to copy; and records in a JSON schema with long keys, which the
grammar forces. Both servers must give the same tokens.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine_impl.errors import RefusedError
from ..protos import orchestrator_pb2 as pb
from ..server.child import server
from ..server.errors import FailedError
from .load.caller import Record
from .load.grpc_caller import GrpcCaller
from .load.loops import closed
from .load.workload import LoadRequest
from .measure.machine import warn_if_busy
from .measure.stats import Ratio
from .measure.table import Progress, table
from .options.flags import facts
from .options.speculate import SpeculateOptions

IDS = (300, 1000)
RANDOM_TOKENS = 64
"""Of a prompt (tokens)."""
TEMPERATURE = 2.0
"""Of their answers: the likeliest tokens of a small model soon go round in circles."""
SENTENCES = 5
"""Of a paragraph."""
NAMES = ("Maria", "Omar", "Ingrid", "Pavel", "Aiko", "Tunde", "Lucia", "Sven")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
THINGS = ("apples", "lanterns", "boats", "kettles", "letters", "carpets")


SHORT = {"type": "string", "minLength": 1, "maxLength": 12}
FIELDS: dict[str, dict[str, Any]] = {
    "customer_first_name": SHORT,
    "customer_last_name": SHORT,
    "shipping_address_city": SHORT,
    "number_of_items_in_the_order": {"type": "integer", "minimum": 1, "maximum": 99},
    "is_the_order_already_paid_for": {"type": "boolean"},
    "preferred_delivery_weekday": {"enum": list(DAYS)},
}
SCHEMA = json.dumps({"type": "object", "properties": FIELDS, "required": list(FIELDS), "additionalProperties": False})


@dataclass(frozen=True)
class Ask(LoadRequest):
    """A request of text."""

    text: str
    """What a user says."""
    schema: str | None = None
    """JSON, of the answer."""


class Caller(GrpcCaller):
    """Sends either."""

    def message(self, ask: LoadRequest) -> pb.DecodeRequest:
        if isinstance(ask, Ask):
            message = pb.DecodeRequest.Message(role="user", content=ask.text)
            chat = pb.DecodeRequest.Chat(messages=[message])
            return pb.DecodeRequest(messages=chat, max_tokens=ask.max_tokens, json_schema=ask.schema)
        message = super().message(ask)
        message.temperature, message.seed = TEMPERATURE, ask.prompt_ids[0]
        return message


def copying(options: SpeculateOptions, block: int) -> list[LoadRequest]:
    """A paragraph once more, with one word changed."""
    return [
        Ask([], options.max_tokens, rewriting(np.random.default_rng([options.seed, block, number])))
        for number in range(options.requests)
    ]


def random(options: SpeculateOptions, block: int) -> list[LoadRequest]:
    """Tokens without a meaning."""
    rng = np.random.default_rng([options.seed, block])
    return [
        LoadRequest(rng.integers(*IDS, RANDOM_TOKENS).tolist(), options.max_tokens) for _ in range(options.requests)
    ]


def recording(options: SpeculateOptions, block: int) -> list[LoadRequest]:
    """An order's record; it ends where it is whole."""
    rng = np.random.default_rng([options.seed, block])
    orders = [
        f"{rng.choice(NAMES)} orders {rng.integers(2, 40)} {rng.choice(THINGS)} for {rng.choice(DAYS)}."
        for _ in range(options.requests)
    ]
    return [Ask([], options.max_tokens, f"{order} Write the record.", SCHEMA) for order in orders]


KINDS: dict[str, Callable[[SpeculateOptions, int], list[LoadRequest]]] = {
    "copies": copying,
    "random": random,
    "schema": recording,
}


def rewriting(rng: np.random.Generator) -> str:
    """The whole prompt."""
    thing, other = rng.choice(THINGS, 2, replace=False)
    sentences = [
        f"On {rng.choice(DAYS)}, {rng.choice(NAMES)} sold {rng.integers(10, 99)} {thing} to {rng.choice(NAMES)} and "
        f"went home at {rng.integers(1, 12)} in the evening."
        for _ in range(SENTENCES)
    ]
    return f"Repeat this text word for word, with {other} instead of {thing}:\n\n{' '.join(sentences)}"


def run(options: SpeculateOptions) -> dict[str, Any]:
    """{"rows": a row for each kind and load, ...the flags}. Raises FailedError when the two do not answer alike, or do
    not answer; RefusedError for answers that are not known."""
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        raise RefusedError(f"answers={unknown[0]!r} must be of {', '.join(KINDS)}")
    warn_if_busy()
    words = ["--speculate", "auto"]
    if options.draft_model is not None:
        words += ["--draft-model", options.draft_model]
    with contextlib.ExitStack() as servers:
        targets = [servers.enter_context(server(options.engine, *flags))[1] for flags in ((), words)]
        rows = asyncio.run(measure(options, targets))
    print(summary(options, rows))
    return facts(options) | {"rows": rows, "equal_tokens": True}


async def measure(options: SpeculateOptions, targets: list[str]) -> list[dict[str, Any]]:
    """The rows; without speculation first."""
    progress = Progress()
    async with contextlib.AsyncExitStack() as stack:
        callers = [
            await stack.enter_async_context(Caller(target, options.timeout_s, ignore_eos=True)) for target in targets
        ]
        rows = []
        for kind in options.kinds:
            asks_of = KINDS[kind]
            for load in options.loads:
                pairs = []
                for block in range(1 + options.pairs):  # the first one warms up
                    progress.show(f"{kind}, {load:g} in flight, block {block}")
                    asks = asks_of(options, block)
                    pair = [await closed(caller, asks, int(load), lambda record: None) for caller in callers]
                    check_alike(*pair)
                    pairs.append(pair)
                rows.append(row_of(kind, load, pairs[1:]))
    progress.clear()
    return rows


def check_alike(off: list[Record], on: list[Record]) -> None:
    """Raises FailedError unless all are answered, with the same tokens."""
    for one, other in zip(off, on, strict=True):
        for record in (one, other):
            if record.status != "completed":
                raise FailedError(f"a request was not answered: {record.detail}")
        if one.token_ids != other.token_ids:
            raise FailedError(f"without speculation {one.token_ids}, with it {other.token_ids}")


def row_of(kind: str, load: float, pairs: list[list[list[Record]]]) -> dict[str, Any]:
    """Of all blocks."""
    speeds = [[speed(records) for records in pair] for pair in pairs]
    on = [record for _, records in pairs for record in records]
    return {
        "kind": kind,
        "load": load,
        "off_tokens_per_second": round(float(np.median([off for off, _ in speeds])), 1),
        "auto_tokens_per_second": round(float(np.median([auto for _, auto in speeds])), 1),
        "accepted_share": round(sum(r.accepted_draft_tokens for r in on) / sum(r.tokens for r in on), 4),
        "speedup": Ratio(tuple(auto / off for off, auto in speeds)).json(),
    }


def speed(records: list[Record]) -> float:
    """Tokens/s of a block, from its first request's sending to its last answer's end."""
    return sum(r.tokens for r in records) / (max(r.end for r in records) - min(r.due for r in records))


def summary(options: SpeculateOptions, rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = (
        f"{options.model}, {options.slots} slots: {options.requests} requests a block, {options.pairs} blocks of each "
        "in turns, the same tokens from both"
    )
    headers = ["answers", "in flight", "tokens/s off", "auto", "from drafts", "auto / off", "min", "max"]
    cells = [
        [
            row["kind"], row["load"], row["off_tokens_per_second"], row["auto_tokens_per_second"],
            row["accepted_share"], *(row["speedup"][name] for name in ("ratio_p50", "ratio_min", "ratio_max")),
        ]
        for row in rows
    ]  # fmt: skip
    return f"{head}\n{table(headers, cells)}"
