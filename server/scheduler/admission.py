"""Requests are let in: taken from the queue, or from those who were pre-empted, and given slots and pages."""

import logging
import time
from collections.abc import Callable, Sequence

from ...engine_impl.errors import AdaptersLostError
from ..delivery.delivery import Delivery
from ..observe.metrics import Metrics
from ..request.adapter import LoadedAdapter
from ..request.request import Request
from .failures import Failures, failed
from .holdings import Holdings
from .lookahead import Lookahead
from .prompt import Prompt
from .queue import RequestQueue

log = logging.getLogger(__name__)


class Admission:
    """The loop's. One thread."""

    def __init__(
        self,
        queue: RequestQueue,
        holdings: Holdings,
        delivery: Delivery,
        failures: Failures,
        metrics: Metrics | None,
        *,
        live: set[Request],
        bring: Callable[[LoadedAdapter | None], int],
    ) -> None:
        """`live` gets whoever is taken from the queue. `bring` gives an adapter's index on the devices."""
        self._queue, self._holdings, self._delivery, self._failures = queue, holdings, delivery, failures
        self._metrics, self._live, self._bring = metrics, live, bring
        self._first: dict[Request, Prompt] = {}  # of those who come next in the queue

    def first(self, most: int) -> Sequence[Prompt] | Lookahead[Prompt]:
        """Of so many requests that come next in the queue; each made when it is looked at, once while it is among the
        first."""
        requests = self._queue.first(most)
        self._first = {request: self._first[request] for request in requests if request in self._first}
        return Lookahead(map(self._prompt_of, requests)) if requests else ()

    def _prompt_of(self, request: Request) -> Prompt:
        if request not in self._first:
            self._first[request] = self._holdings.prompt(request.samples, request.prompt_ids)
        return self._first[request]

    def let_in(self, prompts: Sequence[Prompt]) -> None:
        """In this order, as long as there is room."""
        waiting = self._holdings.parked.waiting
        for prompt in prompts:
            if not self._holdings.room.has_room_for(prompt):
                return  # what grew has taken a cached prefix that the plan counted on: the next one knows
            if prompt in waiting:
                waiting.remove(prompt)
                self._give_room(prompt)
            else:
                self._live.add(prompt.request)  # before it is taken: from then on it may end
                if not self._queue.take(prompt.request):  # it left the queue by itself
                    self._live.discard(prompt.request)
                    continue
                prompt.request.started_at = time.monotonic()
                self._give_room(prompt)
                prompt.request.cached_tokens = prompt.done
                if self._metrics is not None:
                    self._metrics.prefix_cached(prompt.done)

    def _give_room(self, prompt: Prompt) -> None:
        try:
            prompt.adapter = self._bring(prompt.request.adapter)
        except AdaptersLostError:  # others compute with those
            raise
        except Exception as error:
            log.exception("the adapter of request %s could not be brought onto the devices", prompt.request.id)
            self._delivery.end(prompt.request, failed(prompt.request, error))
            self._failures.prefill_failed(error)
            return
        self._holdings.let_in(prompt)
