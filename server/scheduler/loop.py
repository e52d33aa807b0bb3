"""The loop that runs the engine, in a thread of its own, which alone holds the decode state and the pages:

    plan -> free -> prefill -> insert -> generate -> deliver

- plan: plan.py decides what the turn does; nothing is decided here.
- prefill, insert, generate are only started here: they run on the device, and what they give is copied back meanwhile.
  A request for several samples is prefilled once; each further sample draws its own first token from that prefix. A
  long prompt is prefilled piece by piece, a piece a turn, each with a step of the running answers behind it; or within
  that step, where the engine carries it along.
- deliver: reads the results of the turn before, so that the device never waits for the host, and hands them to the
  delivery thread, which makes text and events of them.
- free: at max_tokens as soon as the last step is started; at a stop token when it is read, one step late; at a cancel,
  a deadline or a stop string before the next step. A step in flight may then still bring tokens for the old request:
  its result keeps the roster that it was started with, so the slot's next owner never sees them.
- A sample that is pre-empted leaves its slot and pages at once, and is parked when the step in flight is read: then all
  its tokens are known, and it goes on later as though they had been its prompt.

The device runs what it is given in order. So pages can be given away while a step that reads or fills them is in
flight: what their next owner does comes behind it.

Nothing is done once per slot in Python, and no text is seen. Requests are ended by delivery alone, so each gets exactly
one last event.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Generic

import numpy as np

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT, StepResult
from ...engine_impl.errors import AdaptersLostError, PieceError, RefusedError
from ..delivery.delivery import Delivery
from ..delivery.result import HostResult, PendingResult
from ..delivery.roster import Roster
from ..errors import FailedError, UnavailableError
from ..observe.metrics import Metrics
from ..request.adapter import LoadedAdapter
from ..request.request import FinishReason, Request, Sample
from .constraints import Constraints, allowed_of, due_now
from .failures import DeadError, Failures, describe
from .parked import Parked
from .plan import Scene, StepPlan, adapters_used, plan
from .prefill import Pieces, compute, next_pieces, store
from .probes import Probes
from .prompt import Prompt
from .queue import RequestQueue
from .residents import Residents
from .room import Room
from .slots import Slots
from .widths import Widths

log = logging.getLogger(__name__)

TURNS_A_CHECK = 1024
"""Turns between two checks of the page tables (count)."""


class Loop(Generic[ParamsT, PrefixT, StateT]):
    """run() it in a thread. What other threads tell it: `ended`, `probes`, `closing`, and the queue."""

    def __init__(
        self,
        engine: Engine[ParamsT, PrefixT, StateT],
        params: ParamsT,
        queue: RequestQueue,
        metrics: Metrics | None,
        *,
        prefix_cache: bool = True,
        in_turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`in_turn`: what every turn is made within, and what is done after one that fails."""
        self._engine, self._params, self._queue, self._metrics = engine, params, queue, metrics
        self._in_turn = in_turn
        self._stop_ids = sorted(engine.get_tokenizer().stop_ids)
        self._prefix_cache = prefix_cache
        self.live: set[Request] = set()
        """Taken from the queue, last event not out yet."""
        self.ended: deque[Sample] = deque()
        """Over, by a cancel or a stop string, and perhaps still in a slot."""
        self.probes = Probes()
        self.closing = False
        """Set to end the loop after its turn."""
        self.delivery = Delivery(engine.get_tokenizer(), metrics, free=self._note_ended, on_end=self.live.discard)
        self._slots, self._room = self._nothing_taken()
        self._widths = Widths(engine.widths, engine.max_concurrent_decodes)
        self._residents = Residents(engine.max_adapters)
        self._in_work: list[Prompt] = []  # who is next stands first
        self._parked = Parked()
        self._constraints = Constraints(on_made=queue.wake)
        self._first_prompts: dict[Request, Prompt] = {}  # of those who come next in the queue
        self._newcomers = True  # whose turn it is, see Scene
        self._is_full = False  # who waits first cannot be let in now
        self._pending: list[PendingResult] = []  # what the next turn delivers
        self._apart: Pieces[PrefixT] | None = None  # what devices of their own compute, while steps go on
        self._failures = Failures()
        self._turns = 0
        self._read_at = 0.0  # when the latest result was read (s of time.monotonic())
        self._step_s = 0.0  # what the latest step took
        self._state: StateT  # from start() on

    def _note_ended(self, sample: Sample) -> None:
        """In delivery's thread."""
        self.ended.append(sample)
        self._queue.wake()

    @property
    def slots_in_use(self) -> int:
        return self._slots.in_use

    @property
    def slots_free(self) -> int:
        """That requests in the queue may count on: none while the first that waits finds no room."""
        return 0 if self._is_full else self._slots.free

    @property
    def adapters_on_devices(self) -> frozenset[LoadedAdapter]:
        """May be asked from another thread."""
        return self._residents.adapters

    def pages(self) -> dict[str, int]:
        """How many are free, live and cached."""
        return self._room.states()

    def start(self, *, warm_up: bool) -> None:
        """Makes the decode state; compiles everything if asked to."""
        self._state = self._engine.init_decode_state()
        if warm_up:
            with ThreadPoolExecutor(1) as aside:
                aside.submit(self._engine.get_tokenizer().prepare_grammars)
                self._state = self._engine.warm_up(self._params, self._state)

    def run(self) -> None:
        """Until `closing`. Raises DeadError when the engine keeps failing."""
        try:
            while not self.closing:
                self._queue.wait(until=self._has_work)
                try:
                    with self._in_turn():
                        self._turn()
                except DeadError:
                    raise
                except Exception as error:
                    with self._in_turn():
                        self._recover(error)
        finally:
            self._constraints.close()

    def _has_work(self) -> bool:
        """Not while all who decode wait for what their grammars allow."""
        if self.closing or self._pending or self._in_work or self._parked or self.probes or self.ended:
            return True
        return bool(self._slots.due.taken) or self._constraints.is_made

    def _turn(self) -> None:
        self._go_on()
        self._take_up()
        turn = self._plan()
        self._is_full = turn.is_full
        self._free(turn)
        self._let_in(turn)
        earlier, self._pending = self._pending, []
        prompts = [prompt for prompt in turn.prefill if prompt in self._in_work]
        carried = self._carry(prompts, due_now(self._slots, earlier)) if prompts else None
        if prompts and (error := self._prefill(prompts, carried)):
            self._failures.prefill_failed(error)
        due = due_now(self._slots, earlier)
        if carried is None and (turn.idle_step or due.taken):
            self._generate(due, turn.width)
        for pending in earlier:
            self._deliver(pending)
        self._park()

    def _go_on(self) -> None:
        """Whose grammars tell what may come next. While a step runs, waiting for them costs nothing; and where none
        does, they go on together."""
        made = self._constraints.collect(self._step_s / 2)
        for sample in made:
            assert sample.constraint is not None
            if sample.constraint.error:
                why = f"request {sample.request.id}: {sample.constraint.error}"
                self.delivery.end(sample.request, RefusedError(why))
            elif sample.constraint.is_over:
                self.delivery.end_sample(sample)
            else:
                self._slots.go_on(sample)
                continue
            self._free_slot(sample)
            self._parked.forget(sample)

    def _take_up(self) -> None:
        """Stores what was computed apart, as soon as no step has to wait for it."""
        if self._apart is not None and (self._apart.is_ready() or not self._slots.due.taken):
            pieces, self._apart = self._apart, None
            self._store(pieces)

    def _plan(self) -> StepPlan:
        self._turns += 1
        if self._turns % TURNS_A_CHECK == 0:
            self._room.check_integrity()
        apart: Sequence[Prompt] = () if self._apart is None else self._apart.prompts
        in_parts = {sample for prompt in apart for sample in prompt.samples}
        over = [self.ended.popleft() for _ in range(len(self.ended))]
        self.ended.extend(sample for sample in over if sample in in_parts)  # to be freed when they are stored
        return plan(
            Scene(
                slots=self._slots,
                room=self._room,
                widths=self._widths,
                in_work=[prompt for prompt in self._in_work if prompt not in apart],
                parked=self._parked.waiting,
                queued=self._first_in_queue(),
                ended=[sample for sample in over if sample not in in_parts],
                now=time.monotonic(),
                probe=bool(self.probes) and not any(pending.is_step for pending in self._pending),
                newcomers=self._newcomers,
                batch=self._engine.prefill_batch,
                max_adapters=self._engine.max_adapters,
                is_computing=self._apart is not None,
            )
        )

    def _first_in_queue(self) -> list[Prompt]:
        """Of as many requests as one prefill may take; made once while they are among the first."""
        _, most, _ = self._engine.prefill_batch
        known = self._first_prompts
        self._first_prompts = {
            request: known.get(request) or self._prompt(request.samples, request.prompt_ids)
            for request in self._queue.first(most)
        }
        return list(self._first_prompts.values())

    def _prompt(self, samples: Sequence[Sample], text: Sequence[int]) -> Prompt:
        token_T = np.asarray(text, np.int32)
        return Prompt(tuple(samples), token_T, self._room.names(token_T, samples[0].request.shared_key))

    def _free(self, turn: StepPlan) -> None:
        for request in turn.expired:
            self.delivery.end(request, FinishReason.DEADLINE)
        for prompt in turn.drop:
            self._drop(prompt)
        for sample in turn.free:
            self._free_slot(sample)
        for prompt in turn.postpone:
            self._drop(prompt)
            self._parked.wait(Prompt(prompt.samples, prompt.token_T, prompt.names))
        for sample in turn.preempt:
            self._parked.leave(sample, self._slots.text(sample))
            self._free_slot(sample)
        for _ in (*turn.postpone, *turn.preempt):
            if self._metrics is not None:
                self._metrics.preempted()
        for slot, pages in turn.grow:
            self._room.grow(slot, pages)

    def _let_in(self, turn: StepPlan) -> None:
        for prompt in turn.let_in:
            if not self._room.has_room_for(prompt):
                return  # what grew has taken a cached prefix that the plan counted on: the next one knows
            if prompt in self._parked.waiting:
                self._parked.waiting.remove(prompt)
                self._give_room(prompt)
            else:
                self.live.add(prompt.request)  # before it is taken: from then on it may end
                if not self._queue.take(prompt.request):  # it left the queue by itself
                    self.live.discard(prompt.request)
                    continue
                prompt.request.started_at = time.monotonic()
                self._give_room(prompt)
                prompt.request.cached_tokens = prompt.done
                if self._metrics is not None:
                    self._metrics.prefix_cached(prompt.done)

    def _give_room(self, prompt: Prompt) -> None:
        try:
            prompt.adapter = self._brought(prompt.request.adapter)
        except AdaptersLostError:  # others compute with those
            raise
        except Exception as error:
            log.exception("the adapter of request %s could not be brought onto the devices", prompt.request.id)
            self._fail(prompt.request, error)
            self._failures.prefill_failed(error)
            return
        slots = [self._slots.reserve(sample) for sample in prompt.samples[: prompt.slots_needed]]
        self._room.let_in(prompt, slots)
        self._in_work.append(prompt)

    def _brought(self, adapter: LoadedAdapter | None) -> int:
        """The adapter's index on the devices; if it has to be written there, that comes behind the steps in flight."""
        index = self._residents.find(adapter)
        if index is None:
            assert adapter is not None
            index = self._residents.place(adapter, adapters_used(self._slots, self._in_work, ()))
            try:
                self._params = self._engine.put_adapter(self._params, index, adapter.weights)
            except Exception:
                self._residents.forget(adapter)
                raise
        return index

    def _carry(self, prompts: list[Prompt], roster: Roster) -> PrefixT | None:
        """The next pieces within a step of the running answers, where the engine gains from it; None: nothing was
        started. Pieces that it does not take are told by their prefill."""
        pieces = next_pieces(prompts, self._room)
        if not self._engine.carries(roster.taken, [len(piece.token_T) for piece in pieces]):
            return None
        started, page_NJ = time.monotonic(), self._room.tables(roster.slot_B)
        try:
            self._state, result, prefix = self._engine.carry(
                self._params, self._state, roster.slot_B, page_NJ, pieces, allowed_of(roster)
            )
        except PieceError:
            return None
        self._count_step(result, roster, started, 1, carries=True)
        return prefix

    def _prefill(
        self, prompts: list[Prompt], carried: PrefixT | None = None, *, at_once: bool = False
    ) -> Exception | None:
        """The next pieces, stored; `carried` is what a step has made of them. Those that are computed apart are stored
        later, unless `at_once`. What fails, fails alone: nothing that others have was touched. Returns what went
        wrong."""
        self._newcomers = not self._newcomers
        try:
            pieces = compute(self._engine, self._params, self._state, prompts, self._room, self._slots, carried)
        except Exception as error:
            log.exception("the prefill of requests %s failed", ", ".join(prompt.request.id for prompt in prompts))
            if len(prompts) > 1:  # whose fault it was, shows when each goes alone
                errors = [self._prefill([prompt], at_once=True) for prompt in prompts]
                return next(filter(None, errors), None)
            for prompt in prompts:
                self._drop(prompt)
                self._fail(prompt.request, error)
            return error
        if self._engine.prefills_apart and not at_once:
            self._apart = pieces
        else:
            self._store(pieces)
        return None

    def _store(self, pieces: Pieces[PrefixT]) -> None:
        self._pending += pieces.pending
        self._state = store(self._engine, self._state, pieces, self._room, self._slots)
        for prompt in pieces.prompts:
            self._in_work.remove(prompt)
            if prompt.left:
                self._in_work.append(prompt)  # the others first
            elif not prompt.slots_needed:
                self._room.leave(prompt.tables[0])

    def _generate(self, roster: Roster, width: int) -> None:
        started, page_NJ = time.monotonic(), self._room.tables(roster.slot_B)
        allowed = allowed_of(roster)
        self._state, result = self._engine.generate(self._params, self._state, roster.slot_B, page_NJ, allowed, width)
        self._count_step(result, roster, started, width)

    def _count_step(
        self, result: StepResult, roster: Roster, started: float, width: int, *, carries: bool = False
    ) -> None:
        """A step of these was started (s of time.monotonic())."""
        pending = PendingResult(
            result,
            roster,
            is_step=True,
            started=started,
            is_timed=not carries,
            width=width,
            has_drafts=self._widths.are_drafts,
        )
        self._pending.append(pending)
        for sample in self._slots.count_step(roster, width):
            self._free_slot(sample)

    def _deliver(self, pending: PendingResult) -> None:
        result = pending.read()
        self._count(pending, result)
        if result is None:
            return
        last = self._slots.read(result, counted=pending.width if pending.is_step else 0)
        self._widths.read(result)
        if pending.is_step and self._metrics is not None:
            count_drafts(self._metrics, result)
        self._parked.read(result)
        self._constraints.read(result)
        for sample in (*last, *result.roster.owner_B[result.stopped_B]):
            self._free_slot(sample)
        self.delivery.post(result)

    def _park(self) -> None:
        for sample, text in self._parked.left():
            self._parked.wait(self._prompt([sample], text))

    def _drop(self, prompt: Prompt) -> None:
        """Gives back what a prompt has. Its full pages that are computed stay as a cached prefix."""
        for table in prompt.tables:
            self._room.leave(table)
        for sample in prompt.samples:
            if sample.slot is not None:
                self._slots.take_back(sample)
        (self._in_work if prompt.tables else self._parked.waiting).remove(prompt)

    def _free_slot(self, sample: Sample) -> None:
        """Of a sample that decodes. What its text fills stays as a cached prefix; its last token may lack its row."""
        if sample.slot is not None:
            text_T = self._slots.text(sample)[:-1]
            self._room.leave_text(self._slots.take_back(sample), text_T, sample.request.shared_key)

    def _count(self, pending: PendingResult, result: HostResult | None) -> None:
        """A result that was read is a success. It took the device from the one before it until now."""
        now = time.monotonic()
        duration_s, self._read_at = now - max(pending.started, self._read_at), now
        self._failures.worked(is_step=pending.is_step)
        if pending.is_step:
            self._step_s = duration_s
            if result is not None and pending.is_timed:
                self._widths.took(pending.roster, pending.width, result.width, duration_s)
            self.probes.answer()
        if self._metrics is not None:
            if pending.is_step:
                self._metrics.step(duration_s, slots=pending.roster.taken)
            elif pending.is_timed:
                self._metrics.prefill(duration_s)

    def _recover(self, error: Exception) -> None:
        """A step failed, its state was donated and is lost: fail whoever was in it and start afresh. Who is parked had
        nothing in it."""
        live = list(self.live)  # delivery ends some meanwhile
        failed = [request for request in live if not self._parked.holds_all(request)]
        log.error("a step failed; requests %s fail with it", ", ".join(r.id for r in failed), exc_info=error)
        of_failed = (sample for request in failed for sample in request.samples)
        in_work = (sample for prompt in self._in_work for sample in prompt.samples)
        for sample in (*self._slots.live.owner_B, *in_work, *of_failed):
            sample.slot = None
        self._pending, self._in_work, self._apart = [], [], None
        self._parked.keep({*live} - {*failed})
        self._slots, self._room = self._nothing_taken()
        del self._state  # before the new one is made: two may not fit the device
        for request in failed:
            self._fail(request, error)
        self.probes.answer(UnavailableError(f"a step of the engine failed: {describe(error)}"))
        self._failures.step_failed(error)
        if self._engine.max_adapters:  # what was being written is lost with the step
            self._residents = Residents(self._engine.max_adapters)
            self._params = self._engine.without_adapters(self._params)
        self._state = self._engine.init_decode_state()

    def _nothing_taken(self) -> tuple[Slots, Room]:
        engine = self._engine
        slots = Slots(
            engine.max_concurrent_decodes,
            self._stop_ids,
            cache_length=engine.cache_length,
        )
        return slots, Room(engine, prefix_cache=self._prefix_cache)

    def _fail(self, request: Request, error: Exception) -> None:
        self.delivery.end(request, FailedError(f"request {request.id} failed in the engine: {describe(error)}"))


def count_drafts(metrics: Metrics, result: HostResult) -> None:
    """Of a step."""
    rows = int(np.count_nonzero(result.count_B))
    if result.drafted_B is None or result.agreed_B is None or not rows:
        return
    asked_B = np.minimum(result.drafted_B, result.width - 1)
    accepted_B = np.minimum(result.agreed_B, asked_B)
    metrics.tokens(result.count_B.sum() / rows)
    metrics.drafts(accepted=int(accepted_B.sum()), rejected=int((asked_B - accepted_B).sum()))
