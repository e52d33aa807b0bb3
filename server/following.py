"""A follower's process: no front, no queue, no decisions. Its end is the group's."""

import logging
import signal
import threading

from ..engine_impl.errors import RefusedError
from ..engine_impl.hosts import Following
from .config import ServerConfig
from .observe.endpoint import Endpoint
from .observe.metrics import Metrics
from .process import leave_at_once

log = logging.getLogger(__name__)

FAILED, REFUSED = 1, 2


def follow(group: Following, config: ServerConfig) -> int:
    """Follows until the leader stops the group: 0. SIGTERM or SIGINT asks it to; a second one, like whatever goes
    wrong, ends the process with status 1.

    Raises RefusedError for a group that this host does not fit.
    """
    endpoint = None
    if config.watch.metrics_port is not None:
        endpoint = Endpoint(config.host, config.watch.metrics_port, Metrics().registry, lambda: group.is_ready)
        log.info("readiness on http://%s/readyz", endpoint.address)
    is_asked = threading.Event()

    def on_signal(*_: object) -> None:
        if is_asked.is_set():
            log.error("stopped without the leader")
            leave_at_once(FAILED)
            return
        is_asked.set()
        if group.leave():
            log.info("asked the leader to stop the group")
        else:
            log.info("stopped before the group was together")
            leave_at_once(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    status, why = group.run()
    if status == REFUSED:
        raise RefusedError(why)
    if status:
        log.error(why)
        leave_at_once(status)
    log.info("stopped: %s", why)
    if endpoint is not None:
        endpoint.close()
    return 0
