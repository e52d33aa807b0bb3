"""Whose the rows of a step's result are, as arrays: what a step costs the host does not grow with the slots."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ..request.constraint import Constraint
from ..request.request import Sample

NO_STOP = -2
"""Fills the table of stop ids; no token is negative, and -1 is a dead slot's."""


@dataclass(frozen=True)
class Roster:
    """The owner of each slot, or of some of them. Frozen: a step in flight keeps the one that it was started with.

    E is the most stop ids that one request can have.
    """

    slot_B: np.ndarray
    """i32, which slots these are"""
    owner_B: np.ndarray
    """object: a Sample or None"""
    stop_BE: np.ndarray
    """i32, the tokens that end an owner's answer; NO_STOP where there is none"""
    logprobs_B: np.ndarray
    """i32, what each owner asked for: how many of the likeliest tokens; -1 asks for no logprobs"""
    is_constrained_B: np.ndarray
    """bool, whose answers have a grammar"""

    @classmethod
    def empty(cls, slots: int, width: int) -> "Roster":
        """Of no owners; `width` is E."""
        return cls(
            np.arange(slots, dtype=np.int32),
            np.full(slots, None, object),
            np.full((slots, width), NO_STOP, np.int32),
            np.full(slots, -1, np.int32),
            np.zeros(slots, bool),
        )

    def having(self, slot: int, sample: Sample | None, stop_ids: Sequence[int] = ()) -> "Roster":
        """With `sample` there, or nobody."""
        owner_B, stop_BE, logprobs_B = self.owner_B.copy(), self.stop_BE.copy(), self.logprobs_B.copy()
        is_constrained_B = self.is_constrained_B.copy()
        logprobs = sample.request.sampling.logprobs if sample else None
        owner_B[slot] = sample
        stop_BE[slot] = NO_STOP
        stop_BE[slot, : len(stop_ids)] = stop_ids
        logprobs_B[slot] = -1 if logprobs is None else logprobs
        is_constrained_B[slot] = sample is not None and sample.constraint is not None
        return Roster(self.slot_B, owner_B, stop_BE, logprobs_B, is_constrained_B)

    def of(self, slot_N: np.ndarray) -> "Roster":
        """Of these slots alone, in their order."""
        return Roster(*(getattr(self, one.name)[slot_N] for one in fields(self)))

    def ends(self, token_BW: np.ndarray, count_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where answers meet a stop token among their step's tokens.

        Args:
            token_BW: i32, the step's tokens.
            count_B: i32, how many of them are valid.

        Returns:
            (kept_B i32, tokens before the stop token, or all that are valid; stopped_B bool, whether there is one).
        """
        valid_BW = np.arange(token_BW.shape[1]) < count_B[:, None]
        stops_BW = valid_BW & (token_BW[:, :, None] == self.stop_BE[:, None, :]).any(axis=2)
        stopped_B = stops_BW.any(axis=1)
        return np.where(stopped_B, stops_BW.argmax(axis=1), count_B), stopped_B

    @cached_property
    def most_logprobs(self) -> int:
        """The most that an owner asked for; -1: nobody asked."""
        return int(self.logprobs_B.max(initial=-1))

    @cached_property
    def constrained(self) -> list[tuple[int, Constraint]]:
        """(row, its constraint) of all whose answers have a grammar."""
        return [(int(row), self.owner_B[row].constraint) for row in np.flatnonzero(self.is_constrained_B)]

    @cached_property
    def taken(self) -> int:
        """Slots with an owner."""
        return int(np.count_nonzero(self.owner_B))

    @cached_property
    def seats(self) -> list[tuple[int, Sample]]:
        """(row, sample) of all that are taken: the only walk over the rows, once per roster, and not by the loop."""
        return [(row, sample) for row, sample in enumerate(self.owner_B) if sample is not None]
