"""The waiting room: bounded, by priority and age, shared by the callers and the orchestrator's threads."""

import threading
import time
from bisect import insort_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, islice, takewhile

from ...engine_impl.errors import RefusedError
from ..errors import FIRST_RETRY_S, QueueFullError
from ..request.adapter import LoadedAdapter
from ..request.request import Request
from .turns import Turn, in_turn, rank

RETRY_S = 0.05, 30.0
"""The shortest and the longest retry hint (seconds)."""
PACE_OF = 32
"""Departures that the pace is estimated from (count)."""


class RequestQueue:
    """At most `max_queued` requests beyond those that the free slots will take, and `max_queued_tokens` tokens of
    prompt. Any thread may call any method.

    Who goes first: the highest priority, and the oldest of one priority. Waiting counts: every AGEING_S seconds a
    request moves up by one level, so a request of priority p is served as though it had come p * AGEING_S seconds
    earlier than it did. Priorities are bounded, so nobody starves: what comes 2 * MAX_PRIORITY * AGEING_S seconds
    later cannot go first, whatever its priority.

    Clients take turns: a request counts as having come no earlier than the last one of its client was taken. One who
    comes anew goes before the second of whoever has many waiting, and has a place beyond `max_queued` (and
    `max_queued_tokens`), up to as many again: no client can fill the queue against the others.

    A prompt that alone exceeds `max_queued_tokens` is let into an empty queue: it could never be served otherwise.
    """

    def __init__(
        self,
        max_queued: int,
        max_queued_tokens: int | None = None,
        *,
        slots: int = 0,
        free_slots: Callable[[], int] = lambda: 0,
    ) -> None:
        """`slots` is how many there are, `free_slots` tells how many of them are free now. A request between take()
        and its slots may be counted as though they were still free."""
        self.max_queued, self.max_queued_tokens = max_queued, max_queued_tokens
        self._slots, self._free_slots = slots, free_slots
        self.tokens = 0
        """Tokens of the prompts that wait."""
        self._waiting: list[Request] = []  # who goes first stands first
        self._count_of: Counter[str] = Counter()  # by client, of those that have some
        self._turn: dict[str, Turn] = {}  # by client, when its last one was taken, while others of it wait
        self._taken = 0
        self._departures: deque[float] = deque(maxlen=PACE_OF)
        self._changed = threading.Condition()
        self._closed: Exception | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, *requests: Request) -> None:
        """All of them or none. Raises QueueFullError, RefusedError for more than can ever wait together, or whatever
        the queue was closed with."""
        tokens = sum(len(request.prompt_ids) for request in requests)
        with self._changed:
            client = requests[0].client if requests else ""
            self._check_room([seats(request) for request in requests], tokens, client)
            now = time.monotonic()
            for request in requests:
                request.queued_at = now
                insort_right(self._waiting, request, key=rank)
                self._count_of[request.client] += 1
            self.tokens += tokens
            self._changed.notify_all()

    def check_room(self, client: str = "") -> None:
        """Raises what put() would raise for the client's shortest prompt."""
        with self._changed:
            self._check_room([1], 1, client)

    def adapters(self) -> set[LoadedAdapter]:
        """Those that requests wait for."""
        with self._changed:
            return {request.adapter for request in self._waiting if request.adapter is not None}

    def first(self, count: int) -> list[Request]:
        """Whose turn it is, and who comes then: up to so many of those whose deadline has not passed."""
        with self._changed:
            now = time.monotonic()
            punctual = (request for request in self._waiting if not is_overdue(request, now))
            if len(self._count_of) > 1:
                punctual = in_turn(punctual, self._turn, now)
            return list(islice(punctual, count))

    def take(self, request: Request) -> bool:
        """Whether it was still waiting; then it leaves, to be served."""
        with self._changed:
            if request not in self._waiting:
                return False
            now = time.monotonic()
            self._taken += 1
            self._turn[request.client] = now, self._taken
            self._leave(request)
            self._departures.append(now)
            return True

    def remove(self, request: Request) -> bool:
        """Whether it was still waiting."""
        with self._changed:
            if request not in self._waiting:
                return False
            self._leave(request)
            return True

    def clear(self) -> list[Request]:
        """Takes out all that wait."""
        with self._changed:
            waiting = list(self._waiting)
            for request in waiting:
                self._leave(request)
            self._changed.notify_all()
            return waiting

    def close(self, reason: Exception) -> None:
        """From now on put() raises `reason`, the first one given. What waits already can still be taken."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def wake(self) -> None:
        """wait() asks its condition again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool]) -> None:
        """Sleeps until a request waits here or `until()` holds; asked again at every put(), wake() and close()."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or until())

    def overdue(self) -> list[Request]:
        """Sleeps until deadlines pass, and takes those requests out; an empty list: the queue is closed and empty."""
        with self._changed:
            while self._waiting or self._closed is None:
                now = time.monotonic()
                if late := [request for request in self._waiting if is_overdue(request, now)]:
                    for request in late:
                        self._leave(request)
                    return late
                deadlines = [request.deadline for request in self._waiting if request.deadline is not None]
                self._changed.wait(min(deadlines) - now if deadlines else None)
            return []

    def _leave(self, request: Request) -> None:
        self._waiting.remove(request)
        self.tokens -= len(request.prompt_ids)
        self._count_of[request.client] -= 1
        if not self._count_of[request.client]:
            del self._count_of[request.client]
            self._turn.pop(request.client, None)

    def _check_room(self, more: Sequence[int], tokens: int, client: str) -> None:
        """`more` is the seats of each request of the client's that would come."""
        if self._closed is not None:
            raise self._closed
        count, most, limit = len(more), self.max_queued, self.max_queued_tokens
        if count - starting(more, self._slots) > self.max_queued:
            raise RefusedError(
                f"{count} prompts at once exceed {self._limit(self._slots)}; "
                "send fewer in one request or serve with a larger --max-queued"
            )
        if count > 1 and limit is not None and tokens > limit:
            raise RefusedError(
                f"{count} prompts of {tokens} tokens at once exceed max_queued_tokens={limit}; "
                "send fewer in one request or serve with a larger --max-queued-tokens"
            )
        if self._count_of and client not in self._count_of and count == 1:
            most, limit = 2 * most, None if limit is None else 2 * limit
        free = self._free_slots()
        all_seats = chain(map(seats, self._waiting), more)
        if len(self._waiting) + count - starting(all_seats, free) > most:
            exceed = f", {count} more exceed" if count > 1 else " and"
            raise QueueFullError(
                f"{len(self._waiting)} requests wait already{exceed} {self._limit(free)}; "
                "try again later or serve with a larger --max-queued",
                retry_after_s=self._retry_after_s(),
            )
        if limit is not None and self._waiting and self.tokens + tokens > limit:
            raise QueueFullError(
                f"prompts of {self.tokens} tokens wait already, {tokens} more exceed max_queued_tokens={limit}; "
                "try again later or serve with a larger --max-queued-tokens",
                retry_after_s=self._retry_after_s(),
            )

    def _limit(self, slots: int) -> str:
        """In words, for this many free slots."""
        beyond = f" beyond {slots} free slots" if slots else ""
        return f"max_queued={self.max_queued}{beyond}"

    def _retry_after_s(self) -> float:
        """The mean time between the latest departures, this moment counted as one: a standstill is seen."""
        if not self._departures:
            return FIRST_RETRY_S
        shortest, longest = RETRY_S
        return min(max((time.monotonic() - self._departures[0]) / len(self._departures), shortest), longest)


def seats(request: Request) -> int:
    """The free slots that it is counted against. One that needs none waits for its prefill all the same."""
    return max(1, request.slots_needed)


def starting(seats_of_each: Iterable[int], free_slots: int) -> int:
    """How many of these requests, in their order, the free slots take: up to the first that has to wait."""
    return sum(1 for _ in takewhile(lambda taken: taken <= free_slots, accumulate(seats_of_each)))


def is_overdue(request: Request, now: float) -> bool:
    return request.deadline is not None and request.deadline <= now
