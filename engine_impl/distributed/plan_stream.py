"""The leader's end of the plan stream: a gRPC server that each follower calls once, and stays on.

Calls are put in a queue for each follower and leave in their order; nobody who calls a verb waits for the network.
"""

import hmac
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from ...protos import hosts_pb2 as pb
from ...protos import hosts_pb2_grpc
from ..errors import RefusedError
from .failures import Failures
from .options import stream_options

log = logging.getLogger(__name__)

SPARE = 4
"""Threads for callers that are no followers, who are turned away at once."""
END_S = 10.0
"""How long followers get to end when the group does (seconds)."""

GONE = "the stream to it broke: it died, or answered no pings"


class GroupLostError(Exception):
    """A host of the group is gone or does something else than the others: there is no going on."""


class PlanStream(hosts_pb2_grpc.PlanServicer):
    """Listens from the moment it is made; stop() it. `call` from any thread, in the order that matters."""

    def __init__(self, host: str, hosts: int, secret: str, step_timeout_s: float) -> None:
        """Listens on a free port of `host`, for the hosts 1 to `hosts` - 1. Raises RefusedError where it cannot."""
        self._hosts, self._secret = hosts, secret
        self._queues: dict[int, queue.SimpleQueue[pb.Call | None]] = {}
        self._answers: dict[tuple[int, int], str] = {}
        self._failures = Failures(hosts - 1)
        self._ended: set[int] = set()
        self._changed = threading.Condition()
        self._on_lost: Callable[[str], object] = lambda reason: None
        self._on_leaving: Callable[[str], object] = lambda reason: None
        self._lost: str | None = None
        self._leaving: str | None = None
        self._is_stopping = False
        self._server = grpc.server(ThreadPoolExecutor(hosts + SPARE, "plan"), options=stream_options(step_timeout_s))
        hosts_pb2_grpc.add_PlanServicer_to_server(self, self._server)
        address = f"[{host}]" if ":" in host else host
        try:
            port = self._server.add_insecure_port(f"{address}:0")
        except RuntimeError as error:
            raise RefusedError(f"the leader cannot listen on {host!r}, its name for the others: {error}") from error
        self.address = f"{address}:{port}"
        self._server.start()

    def watch(self, on_lost: Callable[[str], object], on_leaving: Callable[[str], object]) -> None:
        """Each is called once, from any thread, with a reason; at once if it has happened already."""
        with self._changed:
            self._on_lost, self._on_leaving = on_lost, on_leaving
            lost, leaving = self._lost, self._leaving
        if leaving is not None:
            on_leaving(leaving)
        if lost is not None:
            on_lost(lost)

    def wait_for_followers(self, timeout_s: float) -> None:
        """Until all are there. Raises RefusedError that names those who are missing."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._queues) == self._hosts - 1 or self._lost, timeout_s)
            self._check()
            missing = [host for host in range(1, self._hosts) if host not in self._queues]
        if missing:
            raise RefusedError(f"hosts {missing} have not come within {timeout_s:g} s; all {self._hosts} must start")

    def send(self, call: pb.Call) -> None:
        """To all followers. Raises GroupLostError when there is one less."""
        self._check()
        for waiting in self._queues.values():
            waiting.put(call)

    def ended(self, number: int, *, raised: bool) -> None:
        """A call has ended on the leader. A follower on which it has not ended alike is lost, from either's word on."""
        if why := self._failures.here(number, raised=raised):
            self._lose(why)

    def answers(self, number: int) -> dict[int, str]:
        """What each follower says to a call that wants an answer: why it failed, or nothing. Waits for all.

        Raises GroupLostError.
        """
        wanted = [(host, number) for host in range(1, self._hosts)]
        with self._changed:
            self._changed.wait_for(lambda: self._lost or all(one in self._answers for one in wanted))
            self._check()
            return {host: self._answers.pop((host, number)) for host, _ in wanted}

    def stop(self, last: pb.Call) -> None:
        """Sends the last call and waits until the followers have ended, END_S at most."""
        with self._changed:
            self._is_stopping = True
        for waiting in self._queues.values():
            waiting.put(last)
            waiting.put(None)
        with self._changed:
            self._changed.wait_for(lambda: len(self._ended) == len(self._queues), END_S)
        self._server.stop(0).wait()

    def Follow(self, request_iterator: Iterable[pb.Report], context: grpc.ServicerContext) -> Iterator[pb.Call]:
        """A follower's call."""
        about = {key: str(value) for key, value in context.invocation_metadata()}
        if not hmac.compare_digest(about.get("secret", "").encode(), self._secret.encode()):
            log.warning("%s asked for the plan without the group's secret", context.peer())
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this is not your group")
        host, waiting = int(about["host"]), queue.SimpleQueue[pb.Call | None]()
        with self._changed:
            if host in self._queues or not 0 < host < self._hosts:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, f"host {host} follows already, or is none")
            self._queues[host] = waiting
            self._changed.notify_all()
        context.add_callback(lambda: self._end(host))
        threading.Thread(target=self._read, args=(host, request_iterator), name=f"host-{host}", daemon=True).start()
        yield from iter(waiting.get, None)

    def _read(self, host: int, reports: Iterable[pb.Report]) -> None:
        try:
            for report in reports:
                self._take(host, report)
        except grpc.RpcError:
            pass  # the stream's end is told by its callback

    def _take(self, host: int, report: pb.Report) -> None:
        if report.is_leaving:
            self._leave(f"host {host} was asked to stop")
        if report.lost:
            self._lose(f"host {host}: {report.lost}")
        if report.failed and (why := self._failures.there(report.failed, host, report.error)):
            self._lose(why)
        if report.number:
            with self._changed:
                self._answers[host, report.number] = report.error
                self._changed.notify_all()

    def _end(self, host: int) -> None:
        with self._changed:
            self._ended.add(host)
            self._changed.notify_all()
        self._lose(f"host {host}: {GONE}")

    def _leave(self, reason: str) -> None:
        with self._changed:
            if self._leaving is not None:
                return
            self._leaving = reason
        self._on_leaving(reason)

    def _lose(self, reason: str) -> None:
        with self._changed:
            if self._lost is not None or self._is_stopping:
                return
            self._lost = reason
            self._changed.notify_all()
        self._on_lost(reason)
        for waiting in self._queues.values():
            waiting.put(None)

    def _check(self) -> None:
        if self._lost is not None:
            raise GroupLostError(self._lost)
