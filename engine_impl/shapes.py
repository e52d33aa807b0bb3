"""From what a caller names to the few shapes that programs are compiled for. Arithmetic on the host alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .api import Piece
from .errors import PieceError
from .state import PieceBatch

PIECES = (16, 64, 256)
"""Padded lengths of a text's last piece (tokens); behind them in powers of four up to the chunk. A CPU's native kernels
leave padding out (benchmarks/README.md); XLA's products there, without these kernels, compute it."""
STEPS = {"tpu": (8, 32, 128)}
STEPS_ELSEWHERE = (1, 8, 32, 128)
"""Slots that a step computes, by platform; behind them all that there are. A TPU has no step of 1: there a product with
one row is slower than with eight (305 thousand static cycles for two small layers on v5e, of eight 169)."""
WIDTHS = {"cpu": {1: (4, 8), 8: (2, 4)}}
WIDTHS_ELSEWHERE = {32: (4, 8), 64: (4,)}
"""Tokens that a step of so many slots at most computes of each, where something drafts, by platform: the last one and
drafts behind it. Up to 256 rows cost little more than one each: a step waits for its weights up to some 240 rows on
v5e, 560 on v6e. On a CPU each row costs its multiplications."""
WIDE_ROWS = 256
"""The most rows of a wide step."""
BURSTS = {"cpu": (4, 8, 32)}
BURST = (2, 8, 64)
"""Short texts that are prefilled together, by platform: how many at least and at most, and the longest (tokens). On a
CPU each row costs its multiplications: so few texts take no less time together, and longer ones little less
(benchmarks/README.md)."""


class Carried(NamedTuple):
    """Which steps carry a piece of a prompt along."""

    slots: int
    """the smallest step that does; what is smaller is padded"""
    shortest: int
    """padded length of a piece (tokens), likewise"""
    longest: int
    """likewise; longer ones are prefilled, with a step behind"""


CARRIED = {"tpu": Carried(32, 256, 1024)}
"""By platform: where both take so much less time together than one behind the other that their programs are worth their
compilation (docs/tpu-evidence.md). CPUs' are not: short pieces gain most, and each of their programs takes longer to
compile than any other (benchmarks/README.md). GPUs were not measured."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes of one engine's programs."""

    slots: int
    pages_per_slot: int
    page_rows: int
    chunk: int
    """most tokens of a piece"""
    platform: str = "cpu"
    has_adapters: bool = False
    has_reaches: bool = False
    speculates: bool = False
    """whether there are wide steps"""
    carried: Carried | None = None
    """instead of the platform's, for tests and benchmarks"""
    wide: Mapping[int, tuple[int, ...]] | None = None
    """likewise, see WIDTHS"""

    @property
    def prefills(self) -> tuple[tuple[int, int], ...]:
        """(pieces, tokens of each), the smallest first; that for several pieces stands last, if there is one."""
        single = tuple((1, length) for length in self.lengths)
        _, most, tokens = self.burst
        return single if (most, tokens) == single[-1] else (*single, (most, tokens))

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `api.Sizes.prefill_lengths`."""
        lengths = [length for length in PIECES if length < self.chunk]
        while lengths[-1] * 4 < self.chunk:
            lengths.append(lengths[-1] * 4)
        return (*lengths, self.chunk)

    @property
    def burst(self) -> tuple[int, int, int]:
        """See `api.Sizes.prefill_batch`."""
        least, most, tokens = BURSTS.get(self.platform, BURST)
        return (least, min(most, self.slots), tokens) if self.slots >= least else (1, 1, self.chunk)

    @property
    def steps(self) -> tuple[int, ...]:
        """Slots of a step."""
        sizes = STEPS.get(self.platform, STEPS_ELSEWHERE)
        return (*(size for size in sizes if size < self.slots), self.slots)

    @property
    def wide_steps(self) -> tuple[tuple[int, int], ...]:
        """(slots of a step, its width) of those that compute several tokens of each slot, the narrowest first."""
        wide = [(width, size) for size in self.steps for width in self.widths_of(size)[1:]]
        return tuple((size, width) for width, size in sorted(wide))

    @property
    def widths(self) -> tuple[int, ...]:
        """Of any step, ascending."""
        return (1, *sorted({width for _, width in self.wide_steps}))

    def widths_of(self, slots: int) -> tuple[int, ...]:
        """See `api.Engine.widths_of`."""
        size = self.size_of(slots)
        of_sizes = (self.wide or WIDTHS.get(self.platform, WIDTHS_ELSEWHERE)) if self.speculates else {}
        return (1, *next((widths for most, widths in of_sizes.items() if size <= most), ()))

    def width_of(self, slots: int, wanted: int) -> int:
        """The width of a step of so many slots, of which `wanted` is asked: there may be none of so many that is as
        wide.

        Raises ValueError for what is none of `widths`.
        """
        if wanted not in self.widths:
            raise ValueError(f"width={wanted} must be one of {self.widths}")
        return max(width for width in self.widths_of(slots) if width <= wanted)

    def size_of(self, slots: int) -> int:
        """Slots of the step that computes so many.

        Raises ValueError for too many.
        """
        if slots > self.slots:
            raise ValueError(f"{slots} slots are named, there are {self.slots}")
        return next(size for size in self.steps if size >= slots)

    @property
    def carries(self) -> tuple[tuple[int, int], ...]:
        """(slots of a step, tokens of the piece that it carries along), the smallest first."""
        carried = self.carried or CARRIED.get(self.platform)
        if carried is None or self.slots == 1:
            return ()
        sizes = [size for size in self.steps if size >= min(carried.slots, self.slots)]
        shortest, longest = min(carried.shortest, self.chunk), carried.longest
        lengths = [tokens for tokens in self.lengths if shortest <= tokens <= longest]
        return tuple((size, tokens) for size in sizes for tokens in lengths)

    def carry_of(self, slots: int, lengths: Sequence[int]) -> tuple[int, int] | None:
        """The smallest of `carries` that holds so many slots and a piece of so many tokens; None: there is none."""
        if not slots or len(lengths) != 1:
            return None
        return next((shape for shape in self.carries if slots <= shape[0] and lengths[0] <= shape[1]), None)

    def pieces(self, pieces: Sequence[Piece], shape: tuple[int, int] | None = None) -> PieceBatch:
        """The pieces in the smallest shape that holds them, or in this one: (pieces, tokens of each).

        Raises PieceError where no shape does, and for one that does not start with a page.
        """
        N, T = shape or self.prefill_of([len(piece.token_T) for piece in pieces])
        token_NT, next_NT = np.zeros((N, T), np.int32), np.full((N, T), -1, np.int32)
        start_N, count_N, adapter_N, reach_N = np.zeros((4, N), np.int32)
        for n, piece in enumerate(pieces):
            if piece.start % self.page_rows:
                raise PieceError(f"{piece.start=} must be a multiple of page_rows={self.page_rows}")
            start_N[n], count_N[n] = piece.start, len(piece.token_T)
            adapter_N[n], reach_N[n] = piece.adapter, piece.reach
            token_NT[n, : count_N[n]] = piece.token_T
            if piece.logprobs is not None:
                next_NT[n, : count_N[n]] = [*piece.token_T[1:], piece.next_id]
        page_NJ = np.zeros((N, self.pages_per_slot), np.int32)
        for n, piece in enumerate(pieces):
            page_NJ[n, : len(piece.page_J)] = piece.page_J
        asked = np.int32(max(piece.logprobs or 0 for piece in pieces))
        adapters, reaches = adapter_N if self.has_adapters else None, reach_N if self.has_reaches else None
        arrays: Any = token_NT, start_N, count_N, next_NT, asked, page_NJ, adapters, reaches
        return PieceBatch(*arrays)

    def step(self, slot_N: np.ndarray) -> np.ndarray:
        """The slots, filled up to the size of a step with a number that no slot has.

        Raises ValueError for too many.
        """
        return self.filled(slot_N, self.size_of(len(slot_N)))

    def filled(self, slots: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """So many slots, i32, with a number that no slot has behind them."""
        filled_N = np.full(size, self.slots, np.int32)
        filled_N[: len(slots)] = slots
        return filled_N

    def table(self, page_NJ: np.ndarray, size: int) -> np.ndarray:
        """Rows of a page table, i32, filled up to so many, each to the width of the longest request's."""
        filled_NJ = np.zeros((size, self.pages_per_slot), np.int32)
        filled_NJ[: len(page_NJ), : page_NJ.shape[1]] = page_NJ
        return filled_NJ

    def prefill_of(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(pieces, tokens of each) of the smallest shape that holds pieces of so many tokens.

        Raises PieceError where none does.
        """
        if not lengths or not min(lengths):
            raise PieceError(f"pieces of {lengths} tokens: there must be one at least, and none empty")
        _, most, longest = self.burst
        for N, T in self.prefills if len(lengths) == 1 else ((most, longest),):
            if len(lengths) <= N and max(lengths) <= T:
                return N, T
        raise PieceError(
            f"pieces of {lengths} tokens are not prefilled together: one has at most {self.chunk}, "
            f"{most} have at most {longest} each"
        )
