"""The leader's engine: this host's own, and each verb that works on devices is replayed by the followers.

A verb is sent before it is done here: where its program waits for the other hosts, they have it already.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...protos import hosts_pb2 as pb
from .. import api
from ..api import Allowed, AnyEngine, Opening, Piece, StepResult, Tokenizer
from ..errors import RefusedError
from .handles import AdapterHandle, Handle, PrefixHandle
from .plan_stream import PlanStream
from .values import encoded
from .verbs import ALIVE, STOP, VERBS, functions_of, listed


class Leader:
    """As `api.Engine`. Its verbs raise GroupLostError when a host is gone, and else what the engine's raise."""

    def __init__(self, engine: AnyEngine, load: Callable[[], Any], plan: PlanStream) -> None:
        """`load` reads the parameters onto this host's devices."""
        self._engine, self._plan = engine, plan
        self._functions = functions_of(engine, load)
        self._calls, self._handles = itertools.count(1), itertools.count(1)
        self._freed: deque[int] = deque()
        self._failed: deque[int] = deque()
        self._in_order = threading.Lock()
        self.model_name = engine.model_name
        self.sizes, self.prefills_apart, self.devices = engine.sizes, engine.prefills_apart, engine.devices

    def widths_of(self, slots: int) -> tuple[int, ...]:
        """See `api.Engine`: the same on all hosts."""
        return self._engine.widths_of(slots)

    def reach_of(self, length: int) -> int:
        """See `api.Engine`: the same on all hosts."""
        return self._engine.reach_of(length)

    def get_tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._engine.get_tokenizer()

    def carries(self, slots: int, lengths: Sequence[int]) -> bool:
        """See `api.Engine`: decided here alone."""
        return self._engine.carries(slots, lengths)

    def load(self) -> Handle:
        """The parameters, each host's share on its devices."""
        return self._call("load")

    def init_decode_state(self) -> Handle:
        """Only with all hosts there: behind a step that failed, the failure may be known before its cause."""
        self.ask(ALIVE)
        return self._call("init_decode_state")

    def warm_up(self, params: Handle, decode_state: Handle) -> Handle:
        return self._call("warm_up", params, decode_state)

    def read_adapter(self, path: str) -> AdapterHandle:
        """From every host's disk, or the hub. Raises RefusedError, which names the host."""
        weights = self._engine.read_adapter(path)
        handle = AdapterHandle(next(self._handles), weights, self._freed)
        number = self.send("read_adapter", (path,), {}, (handle.number,))
        if errors := {host: error for host, error in self._plan.answers(number).items() if error}:
            raise RefusedError("; ".join(f"host {host}: {error}" for host, error in errors.items()))
        return handle

    def put_adapter(self, params: Handle, index: int, adapter: AdapterHandle) -> Handle:
        return self._call("put_adapter", params, index, adapter)

    def without_adapters(self, params: Handle) -> Handle:
        return self._call("without_adapters", params)

    def prefill(self, params: Handle, decode_state: Handle, pieces: Sequence[Piece]) -> PrefixHandle:
        return self._call("prefill", params, decode_state, pieces)

    def first_tokens(self, prefix: PrefixHandle, openings: Sequence[Opening | None]) -> tuple[PrefixHandle, StepResult]:
        return self._call("first_tokens", prefix, openings)

    def insert(
        self, prefix: PrefixHandle, decode_state: Handle, slots: Sequence[int | None], page_NJ: np.ndarray
    ) -> Handle:
        return self._call("insert", prefix, decode_state, slots, page_NJ)

    def generate(
        self,
        params: Handle,
        decode_state: Handle,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        allowed: Allowed | None = None,
        width: int = 1,
    ) -> tuple[Handle, StepResult]:
        return self._call("generate", params, decode_state, slot_N, page_NJ, allowed, width)

    def carry(
        self,
        params: Handle,
        decode_state: Handle,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        pieces: Sequence[Piece],
        allowed: Allowed | None = None,
    ) -> tuple[Handle, StepResult, PrefixHandle]:
        return self._call("carry", params, decode_state, slot_N, page_NJ, pieces, allowed)

    def ask(self, verb: str, *arguments: Any) -> dict[int, str]:
        """A call that is no engine's verb: what each follower answers, see `PlanStream.answers`."""
        return self._plan.answers(self.send(verb, arguments, {}, ()))

    def stop(self, refusal: str = "") -> None:
        """The group's end, in order; `refusal`: why it never began. Blocks until the followers have left the stream,
        some seconds at most."""
        self._plan.stop(self._message(STOP, (refusal,), {}, ()))

    def _call(self, verb: str, *arguments: Any, **keywords: Any) -> Any:
        kinds = VERBS[verb].results
        numbers = [0 if kind is None else next(self._handles) for kind in kinds]
        number = self.send(verb, arguments, keywords, numbers)
        try:
            results = self._functions[verb](*map(bare, arguments), **{name: bare(of) for name, of in keywords.items()})
        except Exception:
            self._failed.append(number)
            self._plan.ended(number, raised=True)
            raise
        self._plan.ended(number, raised=False)
        handed: tuple[Any, ...] = tuple(
            result if kind is None else kind(handle, result, self._freed)
            for kind, handle, result in zip(kinds, numbers, listed(verb, results), strict=True)
        )
        return handed if len(kinds) > 1 else handed[0]

    def send(self, verb: str, arguments: Sequence[Any], keywords: dict[str, Any], results: Sequence[int]) -> int:
        """A call to the followers: its number. Nothing is done here."""
        with self._in_order:
            call = self._message(verb, arguments, keywords, results)
            self._plan.send(call)
            return call.number

    def _message(
        self, verb: str, arguments: Sequence[Any], keywords: dict[str, Any], results: Sequence[int]
    ) -> pb.Call:
        return pb.Call(
            number=next(self._calls),
            verb=verb,
            arguments=map(encoded, arguments),
            keywords={name: encoded(value) for name, value in keywords.items()},
            results=results,
            freed=all_of(self._freed),
            failed=all_of(self._failed),
        )


def bare(argument: Any) -> Any:
    """What stands behind a handle; anything else as it is."""
    return argument.value if isinstance(argument, Handle) else argument


def all_of(waiting: deque[int]) -> list[int]:
    """Takes out what is there; more may come meanwhile, from other threads."""
    return [waiting.popleft() for _ in range(len(waiting))]


if TYPE_CHECKING:

    def _as_its_face(leader: Leader) -> api.Engine[Handle, PrefixHandle, Handle]:
        return leader
