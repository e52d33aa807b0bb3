"""What a plan is made from is gathered here, each turn anew; what a plan is, and how it is made, is plan.py."""

import time
from collections import deque
from typing import Generic

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ..request.request import Sample
from .admission import Admission
from .execution import Execution
from .holdings import Holdings
from .plan import Scene, StepPlan, plan
from .probes import Probes
from .widths import Widths

TURNS_A_CHECK = 1024
"""Turns between two checks of the page tables (count)."""


class Planner(Generic[ParamsT, PrefixT, StateT]):
    """The loop's. One thread, but for `ended`."""

    def __init__(
        self,
        engine: Engine[ParamsT, PrefixT, StateT],
        execution: Execution[ParamsT, PrefixT, StateT],
        holdings: Holdings,
        admission: Admission,
        widths: Widths,
        probes: Probes,
        ended: deque[Sample],
    ) -> None:
        """`ended`: samples that are over and perhaps still in a slot; other threads add to it, plans take them out."""
        self._execution, self._holdings, self._admission = execution, holdings, admission
        self._widths, self._probes, self._ended = widths, probes, ended
        self._batch, self._max_adapters = engine.sizes.prefill_batch, engine.sizes.max_adapters
        self._newcomers = True  # whose turn it is, see Scene
        self._turns = 0

    def next(self) -> StepPlan:
        """What the next turn does. Raises what is wrong with the page tables."""
        self._turns += 1
        if self._turns % TURNS_A_CHECK == 0:
            self._holdings.room.check_integrity()
        turn = plan(self._scene())
        if turn.prefill:
            self._newcomers = not self._newcomers
        return turn

    def _scene(self) -> Scene:
        apart = self._execution.computed_apart
        in_parts = {sample for prompt in apart for sample in prompt.samples}
        over = [self._ended.popleft() for _ in range(len(self._ended))]
        self._ended.extend(sample for sample in over if sample in in_parts)  # to be freed when they are stored
        most_prompts = self._batch[1]
        return Scene(
            slots=self._holdings.slots,
            room=self._holdings.room,
            widths=self._widths,
            in_work=[prompt for prompt in self._holdings.in_work if prompt not in apart],
            parked=self._holdings.parked.waiting,
            queued=self._admission.first(most_prompts),
            ended=[sample for sample in over if sample not in in_parts],
            now=time.monotonic(),
            probe=bool(self._probes) and not any(pending.is_step for pending in self._execution.pending),
            newcomers=self._newcomers,
            batch=self._batch,
            max_adapters=self._max_adapters,
            is_computing=bool(apart),
        )
