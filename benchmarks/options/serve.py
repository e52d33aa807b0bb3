"""The flags of `slipstream bench serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...engine_impl.errors import RefusedError
from ...server.grpc.channel import DEFAULT_TARGET, PLAIN, ChannelConfig
from .flags import Json, Seed, TokenIds, check_positive, facts, numbers

SCHEMES = ("http://", "https://")
BLOCKS_OF_TWO = 3
"""Blocks of each load where two servers take turns, unless --pairs says otherwise (blocks)."""


class Side(NamedTuple):
    """A server under load."""

    target: str
    model: str | None


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Load a running server over gRPC or OpenAI's HTTP; report latencies (ms), tokens/s, goodput and refusals."""

    target: str = DEFAULT_TARGET
    """The server's address: host:port for gRPC, http://host:port or https://host:port for any server that speaks
    OpenAI's completions (`serve --http-port`, vLLM, SGLang)."""
    model: str | None = None
    """The model's name in HTTP requests. Default: the first that the server lists."""
    versus_target: str | None = None
    """A second server (as --target): each load is run at both in turns (A B A B), with ratios pair by pair. Flags of
    TLS and token are for both."""
    versus_model: str | None = None
    """The second server's --model."""
    pairs: int | None = None
    """Blocks of each load at each of the two servers (blocks). Default: 3."""
    pattern: Literal["closed", "poisson", "bursts"] = "closed"
    """closed: so many requests in flight, always. poisson, bursts: requests come at a rate, answered or not."""
    load: str = "1,4,8"
    """Requests in flight (closed) or requests a second (poisson, bursts); a comma list is run in turn."""
    requests: int = 64
    """Requests counted at each load (requests)."""
    warm_up: int = 8
    """Requests before them that are not counted (requests)."""
    burst_size: int = 8
    """Requests of one burst (requests); the bursts' starts are a Poisson process."""
    prompt_lengths: str = "fixed:128"
    """Prompt lengths (tokens): fixed:N, uniform:LOW:HIGH, sharegpt, or file:PATH (JSON: [[prompt, output], ...])."""
    output_lengths: str = "fixed:64"
    """Longest answers (tokens): likewise. A file gives both; name it in both places."""
    token_ids: TokenIds = "300:1000"
    ignore_eos: bool = False
    """Answers go on past stop tokens to their whole length, so that two servers do the same work. Off by default: real
    answers end, and a server that does not know vLLM's field ignore_eos may refuse it."""
    max_length: int | None = None
    """Prompt and answer together are cut to this (tokens); the server's --cache-length. Default: not cut."""
    seed: Seed = 0
    slo_ttft_ms: float | None = None
    """Goodput counts a request only if its first token came within this (ms)."""
    slo_tpot_ms: float | None = None
    """Likewise its time per output token (ms)."""
    slo_e2e_ms: float | None = None
    """Likewise its whole answer (ms)."""
    timeout_s: float = 600.0
    """How long one request may take (seconds)."""
    plot: Path | None = None
    """Draw latency against load there (.svg or .png)."""
    channel: ChannelConfig = PLAIN
    as_json: Json = False

    def __post_init__(self) -> None:
        for load in self.loads:
            if self.pattern == "closed" and load != int(load):
                raise RefusedError(
                    f"load={load} must be a whole number of requests in flight; or use --pattern poisson"
                )
        check_positive(self, "requests", "burst_size", "pairs")
        if self.warm_up < 0:
            raise RefusedError(f"warm_up={self.warm_up} must be 0 or more")
        if self.max_length is not None and self.max_length < 2:
            raise RefusedError(f"max_length={self.max_length} must be at least 2: one token of prompt, one of answer")
        for side in self.sides:
            self._check(side)
        if self.versus_target is None and (self.pairs is not None or self.versus_model is not None):
            raise RefusedError("--pairs and --versus-model are for two servers: add --versus-target")

    @property
    def loads(self) -> list[float]:
        """Each load that is run."""
        return numbers("load", self.load)

    @property
    def sides(self) -> list[Side]:
        """One server or two."""
        sides = [Side(self.target, self.model)]
        return sides if self.versus_target is None else [*sides, Side(self.versus_target, self.versus_model)]

    @property
    def blocks(self) -> int:
        """Blocks of each load at each server."""
        return 1 if self.versus_target is None else self.pairs or BLOCKS_OF_TWO

    @property
    def slo_ms(self) -> dict[str, float | None]:
        """What a good answer is (ms), by latency; None asks for nothing."""
        return {"ttft": self.slo_ttft_ms, "tpot": self.slo_tpot_ms, "e2e": self.slo_e2e_ms}

    def facts(self) -> dict[str, Any]:
        """For the result's JSON; without the TLS files' paths on the caller's machine."""
        left_out = {"channel", "load", *(f"slo_{name}_ms" for name in self.slo_ms)}
        kept = {name: value for name, value in facts(self).items() if name not in left_out}
        return kept | {"pairs": self.blocks, "slo_ms": self.slo_ms}

    def _check(self, side: Side) -> None:
        """Raises RefusedError unless gRPC or HTTP can be spoken there."""
        if side.target.startswith("http://") and self.channel.is_encrypted:
            raise RefusedError(f"target={side.target!r} is in the clear; --tls flags are for https:// and gRPC")
        if "://" in side.target and not side.target.startswith(SCHEMES):
            raise RefusedError(f"target={side.target!r} must be host:port (gRPC), http://... or https://...")
        if side.model is not None and "://" not in side.target:
            raise RefusedError(f"model={side.model!r} is for http:// targets; over gRPC a server has one model")
