"""What is done after a turn that failed: whoever was in the step is told, and the engine starts afresh."""

import logging
from collections.abc import Collection
from typing import Generic

from ...engine_impl.api import ParamsT, PrefixT, StateT
from ..delivery.delivery import Delivery
from ..errors import UnavailableError
from ..request.request import Request
from .execution import Execution
from .failures import Failures, describe, failed
from .holdings import Holdings
from .probes import Probes

log = logging.getLogger(__name__)


class Recovery(Generic[ParamsT, PrefixT, StateT]):
    """The loop's. One thread."""

    def __init__(
        self,
        execution: Execution[ParamsT, PrefixT, StateT],
        holdings: Holdings,
        delivery: Delivery,
        probes: Probes,
        failures: Failures,
    ) -> None:
        self._execution, self._holdings, self._delivery = execution, holdings, delivery
        self._probes, self._failures = probes, failures

    def recover(self, error: Exception, live: Collection[Request]) -> None:
        """A step failed, its state was donated and is lost: those of `live` fail who were in it. Who is parked had
        nothing in it.

        Raises DeadError when one failure was too many, and what the engine raises that cannot start afresh, before
        anybody is told: then all are told that it is lost.
        """
        live = list(live)  # delivery ends some meanwhile
        lost = [request for request in live if not self._holdings.parked.holds_all(request)]
        log.error("a step failed; requests %s fail with it", ", ".join(r.id for r in lost), exc_info=error)
        self._holdings.lose(lost, {*live} - {*lost})
        self._execution.lose()
        self._execution.start_afresh()
        for request in lost:
            self._delivery.end(request, failed(request, error))
        self._probes.answer(UnavailableError(f"a step of the engine failed: {describe(error)}"))
        self._failures.step_failed(error)
