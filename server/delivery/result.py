"""A step's result on its way from the device to the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...engine_impl.api import DeviceArray, Prefix, StepResult
from .roster import Roster


@dataclass(frozen=True)
class HostResult:
    """A step's tokens on the host, and whose they are. W is the most tokens of a slot in one step."""

    roster: Roster
    token_BW: np.ndarray
    """i32"""
    count_B: np.ndarray
    """i32, how many of a slot's tokens the engine chose"""
    kept_B: np.ndarray
    """i32, how many of them belong to the answer: those before a stop token"""
    stopped_B: np.ndarray
    """bool: whose answer ends with a stop token"""
    logprob_BW: np.ndarray | None
    """f32; None when nobody asked"""
    top_token_BWP: np.ndarray | None
    """i32, the likeliest first; None when nobody asked"""
    top_logprob_BWP: np.ndarray | None
    drafted_B: np.ndarray | None
    """i32, drafts behind each slot's last token; None where nothing drafts"""
    agreed_B: np.ndarray | None
    """i32, how many of them were right, the leading ones"""
    next_logprob_T: np.ndarray | None
    """f32, likewise, of the token behind each of the owner's prompt"""
    next_top_token_TP: np.ndarray | None
    """i32, the likeliest there, the likeliest first; None when nobody asked"""
    next_top_logprob_TP: np.ndarray | None
    """f32, likewise"""

    @property
    def width(self) -> int:
        """W."""
        return self.token_BW.shape[1]


@dataclass(frozen=True)
class PieceLogprobs:
    """Of a piece of a prompt that stands alone."""

    arrays: Sequence[DeviceArray]
    """[1, T] and, if the likeliest tokens are asked for, two of [1, T, P]; the rest of the prefix may go."""
    count: int
    """Its tokens."""

    @classmethod
    def of(cls, prefix: Prefix, count: int, asked: int | None) -> "PieceLogprobs":
        """`asked`: how many of the likeliest tokens."""
        tops = (prefix.top_token_NTP, prefix.top_logprob_NTP) if asked else ()
        return cls((prefix.logprob_NT, *tops), count)


class PendingResult:
    """A result that is copied while the device goes on. One without tokens is waited for all the same."""

    def __init__(
        self,
        result: StepResult | None,
        roster: Roster,
        *,
        is_step: bool,
        started: float,
        is_timed: bool = True,
        width: int = 1,
        has_drafts: bool = False,
        next_logprobs: Sequence[PieceLogprobs] = (),
    ) -> None:
        """`is_step`: of a decode step, not of a prefill. `started`: when it was asked for (s of time.monotonic()).
        `is_timed`: whether its time is a step's or a prefill's own: not where a step carries a piece along, nor where a
        further sample draws from the same prefill.
        `width`: of the step. `has_drafts`: whether it tells of drafts. `next_logprobs`: of the pieces of a prompt."""
        self.roster, self.is_step, self.started, self.is_timed, self.width = roster, is_step, started, is_timed, width
        self._arrays: dict[str, DeviceArray] = {}
        self._next_logprobs = list(next_logprobs)
        if result is not None:
            self._arrays |= {"token_BW": result.token_BW, "count_B": result.count_B}
            if has_drafts:
                self._arrays |= {"drafted_B": result.drafted_B, "agreed_B": result.agreed_B}
            if roster.most_logprobs >= 0:
                self._arrays["logprob_BW"] = result.logprob_BW
            if roster.most_logprobs > 0:
                self._arrays |= {"top_token_BWP": result.top_token_BWP, "top_logprob_BWP": result.top_logprob_BWP}
        for array in (*self._arrays.values(), *(array for piece in self._next_logprobs for array in piece.arrays)):
            array.copy_to_host_async()

    def read(self) -> HostResult | None:
        """Waits for the device; None where it chose no tokens. Raises what went wrong there."""
        rows = len(self.roster.owner_B)
        of_pieces = [[np.asarray(array)[0, : piece.count] for array in piece.arrays] for piece in self._next_logprobs]
        arrays = {name: np.asarray(array)[:rows] for name, array in self._arrays.items()}
        if not arrays:
            return None
        token_BW, count_B = arrays["token_BW"], arrays["count_B"]
        next_logprobs: list[np.ndarray | None] = [np.concatenate(values) for values in zip(*of_pieces, strict=True)]
        next_logprobs += [None] * (3 - len(next_logprobs))
        return HostResult(
            self.roster,
            token_BW,
            count_B,
            *self.roster.ends(token_BW, count_B),
            arrays.get("logprob_BW"),
            arrays.get("top_token_BWP"),
            arrays.get("top_logprob_BWP"),
            arrays.get("drafted_B"),
            arrays.get("agreed_B"),
            *next_logprobs,
        )
