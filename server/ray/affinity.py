"""Which replica a prompt goes to: the one that has computed the most of its beginning, if it is not too busy."""

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

R = TypeVar("R")
"""A replica's name; its str() tells it from others in every process."""

MOST_KNOWN = 1 << 17
"""Blocks that are remembered (count); those that were not asked for the longest go first."""


class Affinity(Generic[R]):
    """One router's memory of who computed what. Chains are those of chain.py."""

    def __init__(self, slack: int) -> None:
        """`slack`: by how many requests a replica may be busier than the least busy one and still be preferred."""
        self._slack = slack
        self._known: OrderedDict[bytes, R] = OrderedDict()

    def ranked(self, chain: Sequence[bytes], load: Mapping[R, int]) -> list[R]:
        """All replicas, the best first. `load`: how many requests each has.

        Behind the one that knows the prompt stand the others by load. Of equally busy ones each router takes the same
        for a prompt, so that several routers need not know of each other; without a chain any of them.
        """
        least = min(load.values(), default=0)
        calm = {replica for replica, requests in load.items() if requests - least <= self._slack}
        known = (self._known.get(block) for block in reversed(chain))
        home = next((replica for replica in known if replica in calm), None)
        first = chain[0] if chain else random.randbytes(8)
        return sorted(load, key=lambda replica: (replica != home, load[replica], rank(replica, first)))

    def remember(self, chain: Sequence[bytes], replica: R) -> None:
        """It has been given such a prompt."""
        for block in chain:
            self._known[block] = replica
            self._known.move_to_end(block)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)


def rank(replica: object, block: bytes) -> bytes:
    """An order of replicas of its own for each block."""
    return blake2b(block + str(replica).encode(), digest_size=8).digest()
