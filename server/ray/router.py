"""Serve's router to the engines: Affinity's choice among the replicas that there are.

Ray's own routers did not fit. `PrefixCacheAffinityRouter` (ray.serve.llm) cannot be imported without vLLM or SGLang.
`ConsistentHashRouter` takes no account of load until a replica refuses, and one system prompt would be one session.
"""

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .affinity import Affinity


class PrefixRouter(RequestRouter):
    """Serve makes one for each handle. What it routes are calls of calls.py.

    It counts what it has under way at each replica: Serve's own count is forgotten where none came for ten seconds,
    and answers take longer.
    """

    def initialize_state(self, slack: int) -> None:
        """Serve calls it with `request_router_kwargs`; `slack` is Affinity's."""
        self._affinity: Affinity[ReplicaID] = Affinity(slack)
        self._under_way: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each in a rank of its own: the next is asked when one is full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # before all are asked once more
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        load = {replica_id: self._under_way[replica_id] for replica_id in by_id}
        return [[by_id[replica_id]] for replica_id in self._affinity.ranked(chain_of(pending_request), load)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._affinity.remember(chain_of(pending_request), replica_id)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._under_way[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Once for each that was sent, however it ended."""
        self._under_way[replica_id] -= 1
        if not self._under_way[replica_id]:
            del self._under_way[replica_id]


def chain_of(request: PendingRequest | None) -> tuple[bytes, ...]:
    """Of what is routed."""
    return request.args[0].chain if request is not None and request.args else ()
