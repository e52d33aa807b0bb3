"""The next pieces of prompts: computed aside, then stored, and samples whose prompt is complete take their seats."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from ...engine_impl.api import Engine, ParamsT, Piece, PrefixT, StateT
from ..delivery.result import PendingResult, PieceLogprobs
from ..request.request import Sample
from ..request.trace import Chunk
from .prompt import Prompt
from .room import Room
from .slots import Slots


@dataclass(frozen=True)
class Pieces(Generic[PrefixT]):
    """What is computed and not stored yet."""

    prompts: Sequence[Prompt]
    tokens: Sequence[int]
    """Of each prompt's piece."""
    firsts: Sequence[Sample | None]
    """Each prompt's first sample, where the prompt is complete with this piece."""
    prefixes: Sequence[PrefixT]
    """The first one has the first token of every prompt that is complete; each one more that of one sample more."""
    pending: Sequence[PendingResult]

    def is_ready(self) -> bool:
        """Whether storing them waits for no device."""
        return all(prefix.is_ready() for prefix in self.prefixes)


def next_pieces(prompts: Sequence[Prompt], room: Room) -> list[Piece]:
    """Of prompts that have pages."""
    return [prompt.piece(min(prompt.left, room.chunk), room.row(prompt.tables[0])) for prompt in prompts]


def compute(
    engine: Engine[ParamsT, PrefixT, StateT],
    params: ParamsT,
    state: StateT,
    prompts: Sequence[Prompt],
    room: Room,
    slots: Slots,
    carried: PrefixT | None = None,
) -> Pieces[PrefixT]:
    """The prompts' next pieces; `carried` is what a step has made of them. Changes nothing but what it gives, whatever
    goes wrong."""
    started, is_timed = time.monotonic(), carried is None
    pieces = next_pieces(prompts, room)
    tokens = [len(piece.token_T) for piece in pieces]
    prefix = engine.prefill(params, state, pieces) if carried is None else carried
    behind = PieceLogprobs.of(prefix, tokens[0], prompts[0].request.asked_prompt_logprobs)
    logprobs = [*prompts[0].next_logprobs, behind] if prompts[0].wants_logprobs else []
    firsts = [p.samples[0] if count == p.left else None for p, count in zip(prompts, tokens, strict=True)]
    if not any(firsts):  # a single piece of a long prompt
        waits = PendingResult(
            None, slots.of([]), is_step=False, started=started, is_timed=is_timed, next_logprobs=[behind]
        )
        return Pieces(prompts, tokens, firsts, [prefix], [waits])
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
                is_timed=is_timed and not pending,
                next_logprobs=[] if pending else logprobs,
            )
        )
    return Pieces(prompts, tokens, firsts, prefixes, pending)


def store(
    engine: Engine[ParamsT, PrefixT, StateT], state: StateT, pieces: Pieces[PrefixT], room: Room, slots: Slots
) -> StateT:
    """The state with the pieces' rows in it. Samples that decode from here on are seated."""
    seats = [None if sample is None else sample.slot for sample in pieces.firsts]
    page_NJ = np.stack([room.row(prompt.tables[0]) for prompt in pieces.prompts])
    first, *others = pieces.prefixes
    state = engine.insert(first, state, seats, page_NJ)
    for prefix, sample, table in zip(
        others, pieces.prompts[0].samples[1:], pieces.prompts[0].tables[1:], strict=False
    ):  # none without slots
        state = engine.insert(prefix, state, [sample.slot], room.row(table)[None])
    for prompt, count, complete in zip(pieces.prompts, pieces.tokens, pieces.firsts, strict=True):
        if prompt.request.trace is not None:
            prompt.request.trace.chunks.append(Chunk(pieces.pending[0].started, prompt.done, count))
        room.advance(prompt, count)
        if prompt.wants_logprobs:
            prompt.next_logprobs.append(PieceLogprobs.of(first, count, prompt.request.asked_prompt_logprobs))
        if complete is not None and prompt.slots_needed:
            for sample in prompt.samples:
                slots.seat(sample, prompt.token_T)
    return state
