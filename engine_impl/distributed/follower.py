"""A follower: it replays the leader's calls on this host's engine, in their order, and decides nothing."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from ...protos import hosts_pb2 as pb
from ...protos import hosts_pb2_grpc
from ..api import StepResult
from ..errors import RefusedError
from ..runtime.watchdog import Watchdog
from .options import stream_options
from .values import decoded
from .verbs import ALIVE, CHECK, STOP, VERBS, listed

log = logging.getLogger(__name__)

DONE, FAILED, REFUSED = 0, 1, 2
"""The process's exit status."""
TOLD_S = 1.0
"""How long the leader gets to hear the last word (seconds)."""

Functions = dict[str, Callable[..., Any]]
Agree = Callable[[dict[str, str], dict[str, int]], Functions]
"""Takes the leader's facts and sizes; gives the verbs of an engine that agrees with them, or raises RefusedError with
what does not."""


class DivergedError(Exception):
    """This host and the leader no longer do the same."""


class Replay:
    """An engine's verbs by the leader's calls, and what they gave, by its numbers."""

    def __init__(self, functions: Functions) -> None:
        """What does each verb, see `verbs.functions_of`."""
        self._functions = functions
        self._held: dict[int, Any] = {}
        self._failed: dict[int, str] = {}

    @property
    def held(self) -> int:
        """How many results are kept."""
        return len(self._held)

    def failure(self, number: int) -> str:
        """Why a call has failed here; empty: it has not."""
        return self._failed.get(number, "")

    def begin(self, call: pb.Call) -> None:
        """What each call tells of those before it: which results nobody wants any more, and which calls failed.

        Raises DivergedError where one has failed on one side alone.
        """
        for number in call.freed:
            self._held.pop(number, None)
        for number in call.failed:
            if self._failed.pop(number, None) is None:
                raise DivergedError(f"call {number} failed on the leader and not here")
        if call.verb == "read_adapter":  # sent out of order: the leader may be at a verb that has failed here already
            return
        for number, error in self._failed.items():
            raise DivergedError(f"call {number} failed here and not on the leader: {error}")

    def do(self, call: pb.Call) -> list[StepResult]:
        """The verb's results that are no handles. One that raises has none: the leader's must have raised, too, as the
        next call tells."""
        arguments = [decoded(value, self._held.__getitem__) for value in call.arguments]
        keywords = {name: decoded(value, self._held.__getitem__) for name, value in call.keywords.items()}
        try:
            results = self._functions[call.verb](*arguments, **keywords)
        except Exception as error:
            self._failed[call.number] = f"{type(error).__name__}: {error}"
            return []
        return self._keep(call, results)

    def read_adapter(self, call: pb.Call) -> str:
        """Out of the calls' order, in a thread of its own: why it failed, or nothing."""
        try:
            self._keep(call, self._functions[call.verb](*(value.text for value in call.arguments)))
        except RefusedError as error:
            return str(error)
        except Exception as error:  # the leader waits for an answer, whatever it is
            log.exception("an adapter could not be read")
            return f"{type(error).__name__}: {error}"
        return ""

    def _keep(self, call: pb.Call, results: Any) -> list[StepResult]:
        told = []
        for number, result in zip(call.results, listed(call.verb, results), strict=True):
            if number:
                self._held[number] = result
            else:
                told.append(result)
        return told


class Follower:
    """run() it in a thread; wait() for its end in another."""

    def __init__(
        self,
        address: str,
        secret: str,
        host: int,
        prepare: Callable[[], Agree],
        step_timeout_s: float,
    ) -> None:
        """`prepare` does what can be done before the leader says a word; it may raise RefusedError."""
        self._prepare = prepare
        self.is_ready = False
        """Whether every program is compiled, and the leader can count on this host."""
        self.is_stopped = False
        """Whether the leader has ended the group, and all its hosts leave it together."""
        self._replay: Replay | None = None
        self._refusal = ""
        self._calls = queue.SimpleQueue[pb.Call]()
        self._reports = queue.SimpleQueue[pb.Report | None]()
        self._results = queue.SimpleQueue[StepResult | None]()
        self._end: tuple[int, str] | None = None
        self._ended = threading.Event()
        self._in_order = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="plan", daemon=True)
        self._dogs = [Watchdog(step_timeout_s, self._fail) for _ in range(2)]
        self._channel = grpc.insecure_channel(address, options=stream_options(step_timeout_s))
        stub = hosts_pb2_grpc.PlanStub(self._channel)
        self._stream = stub.Follow(
            iter(self._reports.get, None), metadata=(("host", str(host)), ("secret", secret)), wait_for_ready=True
        )

    def run(self) -> None:
        """Until the group's end, or its failure."""
        self._reader.start()
        threading.Thread(target=self._watch_results, name="results", daemon=True).start()
        try:
            agree = self._prepare()
            while (call := self._calls.get()).verb != STOP:
                self._take(call, agree)
            self.is_stopped = True
            refusal = self._refusal or call.arguments[0].text
            self._finish(REFUSED if refusal else DONE, refusal or "the leader has stopped the group")
        except RefusedError as error:
            self._finish(REFUSED, str(error))
        except Exception as error:
            log.exception("this host can follow no more")
            self._fail(f"{type(error).__name__}: {error}")

    def wait(self) -> tuple[int, str]:
        """(exit status, why), once it is over."""
        self._ended.wait()
        assert self._end is not None
        if self._end[0] != DONE:
            self._reader.join(TOLD_S)  # the leader ends the stream when it has heard why
        return self._end

    def leave(self) -> None:
        """Asks the leader to drain and to stop the group."""
        self._reports.put(pb.Report(is_leaving=True))

    def close(self) -> None:
        """Its threads end."""
        for dog in self._dogs:
            dog.close()
        self._results.put(None)
        self._reports.put(None)
        self._channel.close()

    def _read(self) -> None:
        """Calls as they come: that the leader is gone is noticed whatever is done meanwhile."""
        try:
            for call in self._stream:
                self._calls.put(call)
                if call.verb == STOP:
                    return
            why = "it has given the group up"
        except grpc.RpcError as error:
            why = f"its stream broke, {error.code() if isinstance(error, grpc.Call) else error}"
        if self._refusal:
            self._finish(REFUSED, self._refusal)
        self._finish(FAILED, f"the leader is gone: {why}")

    def _take(self, call: pb.Call, agree: Agree) -> None:
        if call.verb == CHECK:
            facts, sizes = (decoded(value, int) for value in call.arguments)
            try:
                self._replay = Replay(agree(facts, sizes))
            except RefusedError as error:
                self._refusal = str(error)  # the leader is told first, and then refuses the group
            self._reports.put(pb.Report(number=call.number, error=self._refusal))
            return
        assert self._replay is not None
        self._replay.begin(call)
        if call.verb == ALIVE:
            self._reports.put(pb.Report(number=call.number))
            return
        if call.verb == "read_adapter":
            threading.Thread(target=self._read_adapter, args=(self._replay, call), name="adapter", daemon=True).start()
            return
        results = self._done(self._replay, call)
        if error := self._replay.failure(call.number):  # at once: the next call may be long in coming
            self._reports.put(pb.Report(failed=call.number, error=error))
        for result in results:
            result.token_BW.copy_to_host_async()
            self._results.put(result)
        self.is_ready |= call.verb == "warm_up"

    def _done(self, replay: Replay, call: pb.Call) -> list[StepResult]:
        if not VERBS[call.verb].is_quick:
            return replay.do(call)
        with self._dogs[0].working(f"the leader's call {call.number}, {call.verb},"):
            return replay.do(call)

    def _read_adapter(self, replay: Replay, call: pb.Call) -> None:
        self._reports.put(pb.Report(number=call.number, error=replay.read_adapter(call)))

    def _watch_results(self) -> None:
        """Nobody here wants them, but a step that does not end must be noticed."""
        try:
            for result in iter(self._results.get, None):
                with self._dogs[1].working("a step"):
                    np.asarray(result.token_BW)
        except Exception as error:
            self._fail(f"a step failed: {type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        self._finish(FAILED, reason)

    def _finish(self, status: int, why: str) -> None:
        """The first end counts."""
        with self._in_order:
            if self._end is not None:
                return
            self._end = (status, why)
        self.is_ready = False
        if status != DONE:
            self._reports.put(pb.Report(lost=why))
        self._reports.put(None)
        self._ended.set()
