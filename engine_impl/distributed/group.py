"""A host's life in its group: join -> connect -> compare -> load -> lead or follow -> leave."""

import json
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import hosts
from ..config import EngineConfig
from ..engine import Engine
from ..errors import RefusedError
from ..hosts import Place
from ..loading import build_engine, check_memory, choose_devices, open_draft_model, open_model
from ..runtime import timeline
from ..sizes import free_memory, memory_of
from . import joining
from .checks import differing, facts_of
from .follower import REFUSED, Agree, Follower, Functions
from .leader import Leader
from .plan_stream import PlanStream
from .verbs import CHECK, functions_of

log = logging.getLogger(__name__)

LEADER = "leader"
"""The key under which the leader tells its address and the group's secret."""
COME_S = 60.0
"""How long the leader waits for followers that have joined (seconds), and they for it."""


class LeadingGroup:
    """The leader's. load() it in any thread."""

    def __init__(self, place: Place, config: EngineConfig, step_timeout_s: float) -> None:
        self._place, self._config, self._step_timeout_s = place, config, step_timeout_s
        self._plan: PlanStream | None = None
        self._leader: Leader | None = None
        self._watchers: tuple[Callable[[str], object], Callable[[str], object]] | None = None

    def watch(self, on_lost: Callable[[str], object], on_leaving: Callable[[str], object]) -> None:
        """See `hosts.Peers`. Before load()."""
        self._watchers = (on_lost, on_leaving)

    def load(self) -> tuple[Leader, Any]:
        """The engine and its parameters, as all hosts have them.

        Raises RefusedError for hosts that do not come or do not agree, with both values.
        """
        with timeline.THIS_PROCESS.loading():
            board = joining.join(self._place)
            secret = secrets.token_hex()
            self._plan = PlanStream(self._place.leader_host, self._place.hosts, secret, self._step_timeout_s)
            if self._watchers is not None:
                self._plan.watch(*self._watchers)
            board.write(LEADER, json.dumps([self._plan.address, secret]))
            self._plan.wait_for_followers(COME_S)
            devices = choose_devices(self._config.platform)
            checkpoint, draft = open_model(self._config), open_draft_model(self._config)
            engine = build_engine(self._config, checkpoint, devices, draft_checkpoint=draft)
            check_shares(engine, self._place.hosts)
            self._leader = Leader(engine, partial(engine.parameters.load, checkpoint, draft), self._plan)
            slots, length, tokens = (
                engine.layout.slots,
                engine.layout.length,
                engine.sizes.cache_tokens,
            )
            sizes = {"slots": slots, "cache_length": length, "cache_tokens": tokens}
            answers = self._leader.ask(CHECK, facts_of(self._config, engine, checkpoint, draft), sizes)
            if refusal := "; ".join(f"host {host}: {error}" for host, error in answers.items() if error):
                self._leader.stop(refusal)
                joining.leave()
                raise RefusedError(refusal)
            check_memory(engine, memory_of(engine.mesh.local_devices), free_memory())
            return self._leader, self._leader.load()

    def stop(self) -> None:
        """See `hosts.Peers`."""
        if self._leader is not None:
            self._leader.stop()
            joining.leave()


class FollowingGroup:
    """A follower's."""

    def __init__(self, place: Place, config: EngineConfig, step_timeout_s: float) -> None:
        self._place, self._config, self._step_timeout_s = place, config, step_timeout_s
        self._follower: Follower | None = None

    @property
    def is_ready(self) -> bool:
        return self._follower is not None and self._follower.is_ready

    def run(self) -> tuple[int, str]:
        """See `hosts.Following`."""
        try:
            board = joining.join(self._place)
            address, secret = json.loads(board.read(LEADER, COME_S))
        except RefusedError as error:
            return REFUSED, str(error)
        self._follower = Follower(address, secret, self._place.index, self._prepare, self._step_timeout_s)
        threading.Thread(target=self._follower.run, name="follower", daemon=True).start()
        status, why = self._follower.wait()
        if self._follower.is_stopped:
            self._follower.close()
            joining.leave()
        return status, why

    def leave(self) -> bool:
        """See `hosts.Following`."""
        if self._follower is None:
            return False
        self._follower.leave()
        return True

    def _prepare(self) -> Agree:
        devices = choose_devices(self._config.platform)
        checkpoint, draft = open_model(self._config), open_draft_model(self._config)

        def agree(facts: dict[str, str], sizes: dict[str, int]) -> Functions:
            engine = build_engine(replace(self._config, **sizes), checkpoint, devices, draft_checkpoint=draft)
            if wrong := differing(facts_of(self._config, engine, checkpoint, draft), facts):
                raise RefusedError(wrong)
            check_memory(engine, memory_of(engine.mesh.local_devices), free_memory())
            return functions_of(engine, partial(engine.parameters.load, checkpoint, draft))

        return agree


def check_shares(engine: Engine, count: int) -> None:
    """Raises RefusedError for hosts that would have none of the model."""
    working = {device.process_index for device in engine.mesh.devices.flat}
    if idle := [host for host in range(count) if host not in working]:
        raise RefusedError(
            f"a model over {engine.mesh.size} devices leaves hosts {idle} without a share: use fewer hosts, "
            "or another --tensor-parallel"
        )


if TYPE_CHECKING:

    def _as_peers(group: LeadingGroup) -> hosts.Peers:
        return group

    def _as_following(group: FollowingGroup) -> hosts.Following:
        return group
