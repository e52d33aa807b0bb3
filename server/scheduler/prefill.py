"""The next pieces of prompts: computed aside, then stored, and samples whose prompt is complete take their seats."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ..delivery.result import PendingResult
from ..request.request import Sample
from .prompt import Prompt
from .room import Room
from .slots import Slots


@dataclass(frozen=True)
class Pieces(Generic[PrefixT]):
    """What is computed and not stored yet."""

    prompts: Sequence[Prompt]
    tokens: Sequence[int]
    """Of each prompt's piece."""
    prefixes: Sequence[PrefixT]
    """The first one has the first token of every prompt that is complete; each one more that of one sample more."""
    pending: Sequence[PendingResult]

    def is_complete(self, index: int) -> bool:
        return self.tokens[index] == self.prompts[index].left


def compute(
    engine: Engine[ParamsT, PrefixT, StateT],
    params: ParamsT,
    state: StateT,
    prompts: Sequence[Prompt],
    room: Room,
    slots: Slots,
) -> Pieces[PrefixT]:
    """The prompts' next pieces. Changes nothing but what it gives, whatever goes wrong."""
    started = time.monotonic()
    tokens = [min(prompt.left, room.chunk) for prompt in prompts]
    pieces = [p.piece(count, room.row(p.tables[0])) for p, count in zip(prompts, tokens, strict=True)]
    prefix = engine.prefill(params, state, pieces)
    behind = [(prefix.logprob_NT, tokens[0])]
    logprobs = [*prompts[0].next_logprobs, *behind] if prompts[0].wants_logprobs else []
    firsts = [p.samples[0] if count == p.left else None for p, count in zip(prompts, tokens, strict=True)]
    if not any(firsts):  # a single piece of a long prompt
        waits = PendingResult(None, slots.of([]), is_step=False, started=started, next_logprobs=behind)
        return Pieces(prompts, tokens, [prefix], [waits])
    prefixes, pending = list[PrefixT](), list[PendingResult]()
    for owners in (firsts, *([sample] for sample in prompts[0].samples[1:])):
        openings = [sample and p.opening(sample) for p, sample in zip(prompts, owners, strict=True)]
        prefix, result = engine.first_tokens(prefix, openings)
        prefixes.append(prefix)
        pending.append(
            PendingResult(
                result,
                slots.of(owners),
                is_step=False,
                started=started,
                is_timed=not pending,
                next_logprobs=[] if pending else logprobs,
            )
        )
    return Pieces(prompts, tokens, prefixes, pending)


def store(
    engine: Engine[ParamsT, PrefixT, StateT], state: StateT, pieces: Pieces[PrefixT], room: Room, slots: Slots
) -> StateT:
    """The state with the pieces' rows in it. Samples that decode from here on are seated."""
    completes = [pieces.is_complete(index) for index in range(len(pieces.prompts))]
    seats: list[int | None] = [
        prompt.samples[0].slot if is_complete else None
        for prompt, is_complete in zip(pieces.prompts, completes, strict=True)
    ]
    page_NJ = np.stack([room.row(prompt.tables[0]) for prompt in pieces.prompts])
    first, *others = pieces.prefixes
    state = engine.insert(first, state, seats, page_NJ)
    for prefix, sample, table in zip(
        others, pieces.prompts[0].samples[1:], pieces.prompts[0].tables[1:], strict=False
    ):  # none without slots
        state = engine.insert(prefix, state, [sample.slot], room.row(table)[None])
    for prompt, count, is_complete in zip(pieces.prompts, pieces.tokens, completes, strict=True):
        room.advance(prompt, count)
        if prompt.wants_logprobs:
            prompt.next_logprobs.append((first.logprob_NT, count))
        if is_complete:
            for sample in seated(prompt):
                slots.seat(sample, prompt.token_T)
    return state


def seated(prompt: Prompt) -> Sequence[Sample]:
    """Its samples that decode once it is complete."""
    return prompt.samples if prompt.slots_needed else ()
