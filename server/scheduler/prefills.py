"""The prompts of a turn: their next pieces are computed and stored, and who fails, fails alone.

A request for several samples is prefilled once; each further sample draws its own first token from that prefix. A long
prompt is prefilled piece by piece, a piece a turn, each with a step of the running answers behind it; or within that
step, where the engine carries it along.
"""

import logging
from collections.abc import Sequence
from typing import Generic

from ...engine_impl.api import ParamsT, PrefixT, StateT
from ..delivery.delivery import Delivery
from ..delivery.result import PendingResult
from .constraints import due_now
from .execution import Execution
from .failures import Failures, failed
from .holdings import Holdings
from .prompt import Prompt

log = logging.getLogger(__name__)


class Prefills(Generic[ParamsT, PrefixT, StateT]):
    """The loop's. One thread."""

    def __init__(
        self,
        execution: Execution[ParamsT, PrefixT, StateT],
        holdings: Holdings,
        delivery: Delivery,
        failures: Failures,
    ) -> None:
        self._execution, self._holdings, self._delivery, self._failures = execution, holdings, delivery, failures

    def run(self, planned: Sequence[Prompt], in_flight: Sequence[PendingResult]) -> bool:
        """The next pieces of those that are still in work. Returns whether the next step carried them along: then it
        was started. Raises DeadError when one failure was too many."""
        prompts = [prompt for prompt in planned if prompt in self._holdings.in_work]
        if not prompts:
            return False
        carried = self._execution.carry(prompts, due_now(self._holdings.slots, in_flight))
        if error := self._compute(prompts, carried):
            self._failures.prefill_failed(error)
        return carried is not None

    def _compute(
        self, prompts: list[Prompt], carried: PrefixT | None = None, *, at_once: bool = False
    ) -> Exception | None:
        """Nothing that others have is touched by what fails. Returns what went wrong."""
        try:
            pieces = self._execution.compute(prompts, carried)
        except Exception as error:
            log.exception("the prefill of requests %s failed", ", ".join(prompt.request.id for prompt in prompts))
            if len(prompts) > 1:  # whose fault it was, shows when each goes alone
                errors = [self._compute([prompt], at_once=True) for prompt in prompts]
                return next(filter(None, errors), None)
            for prompt in prompts:
                self._holdings.drop(prompt)
                self._delivery.end(prompt.request, failed(prompt.request, error))
            return error
        self._execution.keep(pieces, at_once=at_once)
        return None
