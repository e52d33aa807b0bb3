"""Whose turn it is among the clients: each takes one after the other, so that none holds the queue."""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import count

from ..request.request import Request

AGEING_S = 5.0
"""How much waiting is worth one level of priority (seconds)."""

Turn = tuple[float, int]
"""When a request was taken (s of time.monotonic()), and its number among all that were."""
NEVER: Turn = (0.0, 0)


def rank(request: Request, turn: float = 0.0) -> float:
    """When it would have had to come, without its priority, to stand where it stands (s). A request counts as having
    come no earlier than its client's last `turn` (s of time.monotonic())."""
    assert request.queued_at is not None
    return max(request.queued_at, turn) - request.priority * AGEING_S


def in_turn(waiting: Iterable[Request], last_turn: Mapping[str, Turn], now: float) -> Iterator[Request]:
    """Those that wait, in the order in which they will be served if nobody else comes.

    Args:
        waiting: by rank().
        last_turn: when a client's last request was taken; a client that is not there had none.
    """
    lanes = defaultdict[str, deque[Request]](deque)
    for request in waiting:
        lanes[request.client].append(request)
    if len(lanes) == 1:
        (lane,) = lanes.values()
        yield from lane
        return
    heads: list[tuple[float, Turn, int, deque[Request]]] = []
    for number, (client, lane) in enumerate(lanes.items()):
        turn = last_turn.get(client, NEVER)
        heapq.heappush(heads, (rank(lane[0], turn[0]), turn, number, lane))
    numbers = count(1 + max((turn[1] for turn in last_turn.values()), default=0))
    while heads:
        *_, number, lane = heads[0]
        yield lane.popleft()
        if lane:  # its next turn is after those who have waited since before now
            heapq.heapreplace(heads, (rank(lane[0], now), (now, next(numbers)), number, lane))
        else:
            heapq.heappop(heads)
