"""Flags of the benchmarks that load running servers: one, or two in turns."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ...engine_impl.errors import RefusedError
from ...server.grpc.channel import DEFAULT_TARGET, PLAIN, ChannelConfig
from .flags import Json, Seed, TokenIds, check_positive, facts, id_range

SCHEMES = ("http://", "https://")
BLOCKS_OF_TWO = 3
"""Blocks of each load where two servers take turns, unless --pairs says otherwise (blocks)."""


class Side(NamedTuple):
    """A server under load."""

    target: str
    model: str | None


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What benchmarks of running servers have in common: where they are, and what they are asked."""

    target: str = DEFAULT_TARGET
    """The server's address: host:port for gRPC, http://host:port or https://host:port for any server that speaks
    OpenAI's completions (`serve --http-port`, vLLM, SGLang, llama.cpp)."""
    model: str | None = None
    """The model's name in HTTP requests. Default: the first that the server lists."""
    versus_target: str | None = None
    """A second server (as --target): each load is run at both in turns (A B A B), with ratios pair by pair. Flags of
    TLS and token are for both."""
    versus_model: str | None = None
    """The second server's --model."""
    pairs: int | None = None
    """Blocks of each load at each of the two servers (blocks). Default: 3."""
    token_ids: TokenIds = "300:1000"
    seed: Seed = 0
    timeout_s: float = 600.0
    """How long one request may take (seconds)."""
    channel: ChannelConfig = PLAIN
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "pairs", "timeout_s")
        _ = self.ids  # refused before anything is sent
        for side in self.sides:
            self._check(side)
        if self.versus_target is None and (self.pairs is not None or self.versus_model is not None):
            raise RefusedError("--pairs and --versus-model are for two servers: add --versus-target")

    @property
    def ids(self) -> tuple[int, int]:
        """The lowest token id of prompts, and one above the highest."""
        return id_range(self.token_ids)

    @property
    def sides(self) -> list[Side]:
        """One server or two."""
        sides = [Side(self.target, self.model)]
        return sides if self.versus_target is None else [*sides, Side(self.versus_target, self.versus_model)]

    @property
    def blocks(self) -> int:
        """Blocks of each load at each server."""
        return 1 if self.versus_target is None else self.pairs or BLOCKS_OF_TWO

    def facts(self) -> dict[str, Any]:
        """For the result's JSON; without the TLS files' paths on the caller's machine."""
        return {name: value for name, value in facts(self).items() if name != "channel"} | {"pairs": self.blocks}

    def _check(self, side: Side) -> None:
        """Raises RefusedError unless gRPC or HTTP can be spoken there."""
        if side.target.startswith("http://") and self.channel.is_encrypted:
            raise RefusedError(f"target={side.target!r} is in the clear; --tls flags are for https:// and gRPC")
        if "://" in side.target and not side.target.startswith(SCHEMES):
            raise RefusedError(f"target={side.target!r} must be host:port (gRPC), http://... or https://...")
        if side.model is not None and "://" not in side.target:
            raise RefusedError(f"model={side.model!r} is for http:// targets; over gRPC a server has one model")
