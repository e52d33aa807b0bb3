"""A step's result on its way from the device to the host."""

from dataclasses import dataclass

import numpy as np

from ...engine_impl.api import DeviceArray, StepResult
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
    prompt_logprob_T: np.ndarray | None
    """f32, likewise, for the owner's prompt"""


class PendingResult:
    """A result that is copied while the device goes on."""

    def __init__(
        self,
        result: StepResult,
        roster: Roster,
        *,
        is_step: bool,
        started: float,
        prompt_logprob_T: DeviceArray | None = None,
    ) -> None:
        """`is_step`: of a decode step, not of a prefill. `started`: when it was asked for (s of time.monotonic())."""
        self.roster, self.is_step, self.started = roster, is_step, started
        self._arrays: dict[str, DeviceArray] = {"token_BW": result.token_BW, "count_B": result.count_B}
        if roster.most_logprobs >= 0:
            self._arrays["logprob_BW"] = result.logprob_BW
        if roster.most_logprobs > 0:
            self._arrays |= {"top_token_BWP": result.top_token_BWP, "top_logprob_BWP": result.top_logprob_BWP}
        if prompt_logprob_T is not None:
            self._arrays["prompt_logprob_T"] = prompt_logprob_T
        for array in self._arrays.values():
            array.copy_to_host_async()

    def read(self) -> HostResult:
        """Waits for the device. Raises what went wrong there."""
        arrays = {name: np.asarray(array) for name, array in self._arrays.items()}
        token_BW, count_B = arrays["token_BW"], arrays["count_B"]
        return HostResult(
            self.roster,
            token_BW,
            count_B,
            *self.roster.ends(token_BW, count_B),
            arrays.get("logprob_BW"),
            arrays.get("top_token_BWP"),
            arrays.get("top_logprob_BWP"),
            arrays.get("prompt_logprob_T"),
        )
