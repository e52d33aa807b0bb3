"""What the engine is told, in order. Here alone are the decode state, which each call donates, and the weights.

Everything is only started here: it runs on the device, and what it gives is copied back meanwhile.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

import numpy as np

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT, StepResult
from ...engine_impl.errors import PieceError
from ..delivery.result import PendingResult
from ..delivery.roster import Roster
from ..request.adapter import LoadedAdapter
from .constraints import allowed_of
from .holdings import Holdings
from .pieces import Pieces, compute, next_pieces, store
from .plan import adapters_used
from .prompt import Prompt
from .residents import Residents
from .widths import Widths

log = logging.getLogger(__name__)


class Execution(Generic[ParamsT, PrefixT, StateT]):
    """The loop's. One thread."""

    def __init__(self, engine: Engine[ParamsT, PrefixT, StateT], params: ParamsT, holdings: Holdings) -> None:
        self._engine, self._params, self._holdings = engine, params, holdings
        self._residents = Residents(engine.sizes.max_adapters)
        self._apart: Pieces[PrefixT] | None = None  # what devices of their own compute, while steps go on
        self._state: StateT  # from start() on
        self.pending: list[PendingResult] = []
        """What was started and is not read yet, in order."""

    def start(self, *, warm_up: bool) -> None:
        """Makes the decode state; compiles everything if asked to."""
        self._state = self._engine.init_decode_state()
        if warm_up:
            with ThreadPoolExecutor(1) as aside:
                aside.submit(self._engine.get_tokenizer().prepare_grammars)
                self._state = self._engine.warm_up(self._params, self._state)

    def time_steps(self, widths: Widths) -> None:
        """Each step that may be wide, over nobody; nothing is in flight. The better of two: a hiccup is no width's."""
        slots, nobody = 1, self._engine.sizes.slots
        while slots <= nobody and len(of_size := self._engine.widths_of(slots)) > 1:
            slot_N, page_NJ = np.full(slots, nobody, np.int32), np.zeros((slots, 0), np.int32)
            rows, seconds = slots, dict[int, float]()
            for width in (*of_size, *of_size):
                started = time.perf_counter()
                self._state, result = self._engine.generate(self._params, self._state, slot_N, page_NJ, None, width)
                result.token_BW.copy_to_host_async()
                rows = max(rows, len(np.asarray(result.token_BW)))  # more slots take no longer
                seconds[width] = min(seconds.get(width, np.inf), time.perf_counter() - started)
            widths.warmed(rows, seconds)
            ms = ", ".join(f"{1000 * seconds[width]:.1f} by {width}" for width in of_size)
            log.info("a step of %d slots takes so many ms by its tokens: %s", rows, ms)
            slots = rows + 1

    def lose(self) -> None:
        """A step failed: what was donated to it is lost, and all that is in flight."""
        self.pending, self._apart = [], None
        del self._state  # before the new one is made: two may not fit the device

    def start_afresh(self) -> None:
        """Behind lose(). Adapters that were being written went with the step."""
        if self._engine.sizes.max_adapters:
            self._residents = Residents(self._engine.sizes.max_adapters)
            self._params = self._engine.without_adapters(self._params)
        self._state = self._engine.init_decode_state()

    @property
    def adapters(self) -> frozenset[LoadedAdapter]:
        """On the devices. May be asked from another thread."""
        return self._residents.adapters

    @property
    def computed_apart(self) -> Sequence[Prompt]:
        """Whose pieces devices of their own compute now."""
        return () if self._apart is None else self._apart.prompts

    def bring(self, adapter: LoadedAdapter | None) -> int:
        """The adapter's index on the devices; if it has to be written there, that comes behind the steps in flight."""
        index = self._residents.find(adapter)
        if index is None:
            assert adapter is not None
            used = adapters_used(self._holdings.slots, self._holdings.in_work, ())
            index = self._residents.place(adapter, used)
            try:
                self._params = self._engine.put_adapter(self._params, index, adapter.weights)
            except Exception:
                self._residents.forget(adapter)
                raise
        return index

    def carry(self, prompts: list[Prompt], roster: Roster) -> PrefixT | None:
        """The next pieces within a step of the running answers, where the engine gains from it; None: nothing was
        started. Pieces that it does not take are told by their prefill."""
        room = self._holdings.room
        pieces = next_pieces(prompts, room)
        if not self._engine.carries(roster.taken, [len(piece.token_T) for piece in pieces]):
            return None
        started, page_NJ = time.monotonic(), room.tables(roster.slot_B)
        try:
            self._state, result, prefix = self._engine.carry(
                self._params, self._state, roster.slot_B, page_NJ, pieces, allowed_of(roster)
            )
        except PieceError:
            return None
        self._count_step(result, roster, started, 1, carries=True)
        return prefix

    def compute(self, prompts: list[Prompt], carried: PrefixT | None) -> Pieces[PrefixT]:
        """The next pieces, for keep(); `carried` is what a step has made of them. What is raised leaves everything as
        it was."""
        room, slots = self._holdings.room, self._holdings.slots
        return compute(self._engine, self._params, self._state, prompts, room, slots, carried)

    def keep(self, pieces: Pieces[PrefixT], *, at_once: bool) -> None:
        """They are stored; those that devices of their own compute later, see take_up(), unless `at_once`."""
        if self._engine.prefills_apart and not at_once:
            self._apart = pieces
        else:
            self._store(pieces)

    def take_up(self) -> None:
        """Stores what was computed apart, as soon as no step has to wait for it."""
        if self._apart is not None and (self._apart.is_ready() or not self._holdings.slots.due.taken):
            pieces, self._apart = self._apart, None
            self._store(pieces)

    def generate(self, roster: Roster, width: int) -> None:
        """A step of these."""
        started, page_NJ = time.monotonic(), self._holdings.room.tables(roster.slot_B)
        allowed = allowed_of(roster)
        self._state, result = self._engine.generate(self._params, self._state, roster.slot_B, page_NJ, allowed, width)
        self._count_step(result, roster, started, width)

    def _store(self, pieces: Pieces[PrefixT]) -> None:
        self.pending += pieces.pending
        self._state = store(self._engine, self._state, pieces, self._holdings.room, self._holdings.slots)
        for prompt in pieces.prompts:
            self._holdings.advance(prompt)

    def _count_step(
        self, result: StepResult, roster: Roster, started: float, width: int, *, carries: bool = False
    ) -> None:
        """A step of these was started (s of time.monotonic())."""
        self.pending.append(
            PendingResult(
                result,
                roster,
                is_step=True,
                started=started,
                is_timed=not carries,
                width=width,
                has_drafts=self._engine.sizes.tokens_per_step > 1,
            )
        )
        for sample in self._holdings.slots.count_step(roster, width):
            self._holdings.free(sample)
