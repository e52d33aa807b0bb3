"""What is computed before samples can decode."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...engine_impl.api import Opening, Piece
from ..delivery.result import PieceLogprobs
from ..request.request import Request, Sample


@dataclass(eq=False)
class Prompt:
    """A request's prompt, for all its samples; or what a pre-empted sample has so far, prompt and answer, for it alone.

    It waits, then it is computed piece by piece, and then its samples take their seats.
    """

    samples: tuple[Sample, ...]
    token_T: np.ndarray
    """i32"""
    names: Sequence[bytes]
    """Of its full pages, by which cached prefixes are found; empty where none are kept."""
    tables: list[int] = field(default_factory=list[int])
    """Rows of the page table: one for each slot that its samples reserved; else one that is no slot's. Empty while it
    waits."""
    adapter: int = 0
    """Its adapter's index on the devices, from when it is let in; 0 is none."""
    done: int = 0
    """Tokens whose rows are in the cache."""
    next_logprobs: list[PieceLogprobs] = field(default_factory=list[PieceLogprobs])
    """Of the pieces so far, where they are asked for."""

    @property
    def request(self) -> Request:
        return self.samples[0].request

    @property
    def is_fresh(self) -> bool:
        """Whether there is nothing of an answer yet."""
        return len(self.token_T) == len(self.request.prompt_ids)

    @property
    def left(self) -> int:
        """Tokens still to be computed."""
        return len(self.token_T) - self.done

    @property
    def slots_needed(self) -> int:
        """A single token comes from the prefill and needs none."""
        answered = len(self.token_T) - len(self.request.prompt_ids)
        return len(self.samples) if self.request.max_tokens - answered > 1 else 0

    @property
    def tables_needed(self) -> int:
        return max(1, self.slots_needed)

    @property
    def wants_logprobs(self) -> bool:
        return self.request.asked_prompt_logprobs is not None and self.is_fresh

    @property
    def stands_alone(self) -> bool:
        """Whether it cannot be computed together with others."""
        return len(self.samples) > 1 or self.wants_logprobs

    def piece(self, tokens: int, page_J: np.ndarray) -> Piece:
        """The next so many tokens."""
        end = self.done + tokens
        return Piece(
            token_T=self.token_T[self.done : end],
            start=self.done,
            page_J=page_J,
            next_id=int(self.token_T[end]) if end < len(self.token_T) else -1,
            logprobs=self.request.asked_prompt_logprobs if self.is_fresh else None,
            adapter=self.adapter,
            reach=self.request.reach,
        )

    def opening(self, sample: Sample) -> Opening:
        """How it goes on for a sample."""
        return Opening(
            text=self.token_T,
            prompt_length=len(self.request.prompt_ids),
            sampling=sample.sampling,
            allowed_W=None if sample.constraint is None else sample.constraint.allowed_W,
            prediction=self.request.prediction_ids,
        )
