"""JAX's multi-controller runtime: a process on each host, and the key-value store that all of them see."""

import logging

import jax
from jax._src import distributed

from ..errors import RefusedError
from ..hosts import Place

log = logging.getLogger(__name__)

JOIN_S = 300
"""How long hosts wait for each other when they start (seconds)."""
HEARTBEAT_S = 100
"""After which JAX itself ends a host whose process is gone (seconds): the plan stream notices at once."""
LEAVE_S = 10
"""How long hosts wait for each other at their orderly end (seconds)."""


class Board:
    """What one host writes, all read."""

    def write(self, key: str, text: str) -> None:
        """Once."""
        self._client.key_value_set(f"slipstream/{key}", text)

    def read(self, key: str, timeout_s: float) -> str:
        """Waits until it is written. Raises RefusedError when it is not."""
        try:
            return self._client.blocking_key_value_get(f"slipstream/{key}", round(timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise RefusedError(f"the leader has said nothing within {timeout_s:g} s: look at its log") from error

    @property
    def _client(self):
        client = distributed.global_state.client  # there is no public way to it
        assert client is not None, "no group was joined"
        return client


def join(place: Place) -> Board:
    """Returns when all hosts have come. Must precede whatever asks JAX for devices.

    Raises RefusedError when they have not come in time.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    log.info("host %d of %d, waiting for the others at %s", place.index, place.hosts, place.coordinator)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.hosts,
            place.index,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=LEAVE_S,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise RefusedError(
            f"not all {place.hosts} hosts met at {place.coordinator} in {JOIN_S} s ({reason})"
        ) from error
    return Board()


def leave() -> None:
    """The orderly end: returns when all hosts have come to it."""
    jax.distributed.shutdown()
