"""Leaders and followers over real gRPC in one process, on engines whose answers you can compute in your head."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from slipstream.engine_impl.distributed.follower import DONE, Follower
from slipstream.engine_impl.distributed.leader import Leader
from slipstream.engine_impl.distributed.plan_stream import PlanStream
from slipstream.engine_impl.distributed.verbs import CHECK, functions_of

from tests.fakes import FakeEngine

WAIT_S = 10.0
SECRET = "a secret"


class Group:
    """A leader, and a follower for each other engine."""

    def __init__(self, *engines: FakeEngine, step_timeout_s: float = 0.0, prepare=None) -> None:
        self.engines = engines
        self.plan = PlanStream("127.0.0.1", len(engines), SECRET, step_timeout_s)
        self.lost, self.leaving = Heard(), Heard()
        self.plan.watch(self.lost, self.leaving)
        self.followers = [
            Follower(self.plan.address, SECRET, host, prepare or agreeing(engine), step_timeout_s)
            for host, engine in enumerate(engines[1:], start=1)
        ]
        for follower in self.followers:
            threading.Thread(target=follower.run, daemon=True).start()
        self.plan.wait_for_followers(WAIT_S)
        self.leader = Leader(engines[0], lambda: "parameters", self.plan)

    def close(self) -> None:
        for follower in self.followers:
            follower.close()


class Heard:
    """A callback that is called once."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._called = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self._called.set()

    def wait(self) -> str:
        assert self._called.wait(WAIT_S)
        return self.reasons[0]


def agreeing(engine: FakeEngine):
    """A follower's preparation that agrees with whatever the leader says."""
    return lambda: lambda facts, sizes: functions_of(engine, lambda: "parameters")


@contextmanager
def group(*engines: FakeEngine, step_timeout_s: float = 0.0, checked: bool = True) -> Iterator[Group]:
    """Together, compared, and stopped at the end if nothing went wrong."""
    made = Group(*engines, step_timeout_s=step_timeout_s)
    try:
        if checked:
            made.leader.ask(CHECK, {}, {})
        yield made
        if not made.lost.reasons:
            made.leader.stop()
            assert [follower.wait()[0] for follower in made.followers] == [DONE] * len(made.followers)
            assert made.lost.reasons == []
    finally:
        made.close()
