"""A step's tokens on their way from the device to the host."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..scheduler.slots import Roster


@dataclass(frozen=True)
class Landing:
    """Tokens that have arrived, and whose they are."""

    roster: Roster
    token_B: np.ndarray
    stopped_B: np.ndarray
    """bool: whose answer its token ends, itself no part of it"""
    logprob_B: np.ndarray | None
    """f32; None when nobody asked"""
    top_token_BP: np.ndarray | None
    """i32, the likeliest first; None when nobody asked"""
    top_logprob_BP: np.ndarray | None
    prompt_logprob_T: np.ndarray | None
    """f32, likewise, for the owner's prompt"""


class Flight:
    """Tokens on their way from the device, copied while the device goes on."""

    def __init__(
        self, result: Any, roster: Roster, *, is_step: bool, started: float, prompt_logprob_T: Any = None
    ) -> None:
        """`result` is the engine's StepResult, `started` when it was asked for (s of time.monotonic())."""
        self.roster, self.is_step, self.started = roster, is_step, started
        self._arrays = {"token_B": result.token_B}
        if roster.most_logprobs >= 0:
            self._arrays["logprob_B"] = result.logprob_B
        if roster.most_logprobs > 0:
            self._arrays |= {"top_token_BP": result.top_token_BP, "top_logprob_BP": result.top_logprob_BP}
        if prompt_logprob_T is not None:
            self._arrays["prompt_logprob_T"] = prompt_logprob_T
        for array in self._arrays.values():
            array.copy_to_host_async()

    def land(self) -> Landing:
        """Waits for the device. Raises what went wrong there."""
        arrays = {name: np.asarray(array) for name, array in self._arrays.items()}
        return Landing(
            self.roster,
            arrays["token_B"],
            self.roster.stopped_B(arrays["token_B"]),
            arrays.get("logprob_B"),
            arrays.get("top_token_BP"),
            arrays.get("top_logprob_BP"),
            arrays.get("prompt_logprob_T"),
        )
