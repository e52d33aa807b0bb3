"""What a plan is made from is gathered here, each turn anew; what a plan is, and how it is made, is plan.py."""

import time
from collections import deque
from dataclasses import replace
from typing import Generic

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ..request.request import Sample
from .admission import Admission
from .execution import Execution
from .holdings import Holdings
from .plan import Scene, StepPlan, plan
from .prefill_budget import PrefillBudget
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
        self._engine, self._execution, self._holdings, self._admission = engine, execution, holdings, admission
        self._widths, self._probes, self._ended = widths, probes, ended
        sizes = engine.sizes
        self._max_adapters = sizes.max_adapters
        self._single = PrefillBudget(sizes.prefill_batch, sizes.prefill_lengths, 0, sizes.skips_padding)
        # streams that run wait for a chunk and a step at most
        self._several = self._single if engine.prefills_apart else replace(self._single, tokens=sizes.prefill_chunk)
        self._most_prompts = self._several.most_prompts
        self._newcomers = True  # whose turn it is, see Scene
        self._turns = 0

    def next(self) -> StepPlan:
        """What the next turn does. Raises what is wrong with the page tables."""
        self._turns += 1
        if self._turns % TURNS_A_CHECK == 0:
            self._holdings.room.check_integrity()
        turn = plan(self._scene())
        if turn.prefills:
            self._newcomers = not self._newcomers
        return turn

    def _scene(self) -> Scene:
        apart = self._execution.computed_apart
        in_parts = {sample for prompt in apart for sample in prompt.samples}
        over = [self._ended.popleft() for _ in range(len(self._ended))]
        self._ended.extend(sample for sample in over if sample in in_parts)  # to be freed when they are stored
        in_work = [prompt for prompt in self._holdings.in_work if prompt not in apart]
        parked, queued = self._holdings.parked.waiting, self._admission.first(self._most_prompts)
        running = self._holdings.slots.due.taken if in_work or parked or queued else 0
        is_carried = running > 0 and self._engine.carries(running, [1])
        return Scene(
            slots=self._holdings.slots,
            room=self._holdings.room,
            widths=self._widths,
            in_work=in_work,
            parked=parked,
            queued=queued,
            ended=[sample for sample in over if sample not in in_parts],
            now=time.monotonic(),
            probe=bool(self._probes) and not any(pending.is_step for pending in self._execution.pending),
            newcomers=self._newcomers,
            budget=self._single if is_carried else self._several,
            max_adapters=self._max_adapters,
            is_computing=bool(apart),
        )
