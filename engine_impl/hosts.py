"""Several hosts that serve one model together: which of them this one is, and what a server knows of the others.

A process on each; the leader, host 0, decides and answers, the followers do what it does. Nothing heavy is imported
here: the command line reads it first.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from .errors import RefusedError

PORT = 8482
"""Where hosts meet, on the leader, when the environment names no other: JAX's own for TPUs."""
MAX_PORT = 65535

LWS = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
NAMES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
INDEX = "TPU_WORKER_ID"


@dataclass(frozen=True)
class Place:
    """One host of a group."""

    coordinator: str
    """host:port on the leader, where all meet"""
    hosts: int
    """how many there are"""
    index: int
    """which one this is; 0 is the leader"""

    @property
    def is_leader(self) -> bool:
        return self.index == 0

    @property
    def leader_host(self) -> str:
        """The leader's name or address, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Which hosts serve the model together, a process on each. All are started with the same flags."""

    hosts: Literal["one", "auto"] = "one"
    """`auto`: those that the environment names, as LeaderWorkerSet and GKE's TPU node pools set it. `one`: this host
    alone, or those of --coordinator."""

    coordinator: str | None = None
    """Instead: where the hosts meet, a free port on host 0 (HOST:PORT)."""

    num_hosts: int | None = None
    """With --coordinator: how many hosts there are."""

    host_index: int | None = None
    """With --coordinator: which of them this one is; host 0 leads."""

    def __post_init__(self) -> None:
        given = (self.coordinator, self.num_hosts, self.host_index)
        if self.hosts == "auto" and any(value is not None for value in given):
            raise RefusedError(
                "--hosts auto takes all from the environment: leave it out, or --coordinator and its like"
            )
        if any(value is None for value in given) and any(value is not None for value in given):
            raise RefusedError("--coordinator, --num-hosts and --host-index are given together, or none of them")
        if self.coordinator is not None and self.num_hosts is not None and self.host_index is not None:
            check_place(Place(self.coordinator, self.num_hosts, self.host_index))

    def place(self, environment: Mapping[str, str]) -> Place | None:
        """This host's; None: it is alone. Raises RefusedError for an environment that names no hosts."""
        if self.hosts == "auto":
            return place_in(environment)
        if self.coordinator is None or self.num_hosts is None or self.host_index is None:
            return None
        return Place(self.coordinator, self.num_hosts, self.host_index) if self.num_hosts > 1 else None


def place_in(environment: Mapping[str, str]) -> Place | None:
    """As LeaderWorkerSet sets it, or GKE for a TPU slice of several hosts; None for a group of one.

    Raises RefusedError, which names the variables.
    """
    names = next((environment[name] for name in NAMES if environment.get(name)), "").split(",")
    index = environment.get(INDEX)
    if environment.get(LWS[0]):
        address, size, own = (environment.get(name, "") for name in LWS)
        if environment.get(NAMES[1]) and (len(names), index) != (number(LWS[1], size), own):
            raise RefusedError(
                f"{LWS[1]}={size} and {LWS[2]}={own}, but the TPUs' own variables say host {index} of {len(names)}: "
                "every pod of the group, the leader too, must ask for its host's TPUs"
            )
        place = Place(join_port(address, PORT), number(LWS[1], size), number(LWS[2], own))
    elif names[0] and index is not None:
        host = re.sub(r":[0-9]+$", "", names[0])
        place = Place(join_port(host, PORT), len(names), number(INDEX, index))
    else:
        raise RefusedError(
            f"--hosts auto finds no hosts: neither {', '.join(LWS)} are set, "
            f"nor {INDEX} with {NAMES[1]} or {NAMES[0]}; give --coordinator, --num-hosts and --host-index"
        )
    if place.hosts == 1:
        return None
    check_place(place)
    return place


def check_place(place: Place) -> None:
    """Raises RefusedError."""
    match = re.fullmatch(r"(?:\[[^\[\]]+\]|[^\[\]:]+):([0-9]{1,5})", place.coordinator)
    if match is None or not 0 < int(match[1]) <= MAX_PORT:
        raise RefusedError(f"coordinator={place.coordinator!r} must be HOST:PORT or [IPV6]:PORT, a port of host 0")
    if place.hosts < 1:
        raise RefusedError(f"num_hosts={place.hosts} must be at least 1")
    if not 0 <= place.index < place.hosts:
        raise RefusedError(
            f"host_index={place.index} must be from 0 to {place.hosts - 1}: there are {place.hosts} hosts"
        )


def number(name: str, text: str) -> int:
    """Raises RefusedError."""
    if not text.isdigit():
        raise RefusedError(f"{name}={text!r} must be a number")
    return int(text)


def join_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Peers(Protocol):
    """The other hosts, as the leader's server sees them."""

    def watch(self, on_lost: Callable[[str], object], on_leaving: Callable[[str], object]) -> None:
        """Each is called once at most, from any thread, with a reason: there is no going on without a host that is
        lost; one that is leaving waits for the group's end."""
        ...

    def stop(self) -> None:
        """The group's end. Blocks until all have come to it, some seconds at most."""
        ...


class Following(Protocol):
    """A follower, as its process sees it."""

    @property
    def is_ready(self) -> bool:
        """Whether the leader can count on it."""
        ...

    def run(self) -> tuple[int, str]:
        """(exit status, why). Blocks until the group's end or failure."""
        ...

    def leave(self) -> bool:
        """Asks the leader to drain and to stop the group; False: it does not follow yet."""
        ...
