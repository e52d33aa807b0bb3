"""slipstream bench serve: load a running server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...engine_impl.errors import RefusedError
from ...server.grpc.channel import PLAIN, ChannelConfig
from ..ask import DEFAULT_TARGET
from .flags import JsonFlag, check_positive, finish, numbers

SCHEMES = ("http://", "https://")
PAIRS = 3


@dataclass(frozen=True, kw_only=True)
class BenchServe:
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
    token_ids: str = "300:1000"
    """Prompts are drawn from these ids (LOW:HIGH, HIGH left out). The server counts a stop token as an end."""
    ignore_eos: bool = False
    """Answers go on past stop tokens to their whole length, so that two servers do the same work. Off by default: real
    answers end, and a server that does not know vLLM's field ignore_eos may refuse it."""
    max_length: int | None = None
    """Prompt and answer together are cut to this (tokens); the server's --cache-length. Default: not cut."""
    seed: int = 0
    """Same seed, same requests at the same times (a number)."""
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
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for load in numbers("load", self.load):
            if self.pattern == "closed" and load != int(load):
                raise RefusedError(
                    f"load={load} must be a whole number of requests in flight; or use --pattern poisson"
                )
        for name in ("requests", "burst_size", "pairs"):
            check_positive(name, getattr(self, name))
        if self.warm_up < 0:
            raise RefusedError(f"warm_up={self.warm_up} must be 0 or more")
        check_target(self.target, self.model, self.channel)
        if self.versus_target is not None:
            check_target(self.versus_target, self.versus_model, self.channel)
        elif self.pairs is not None or self.versus_model is not None:
            raise RefusedError("--pairs and --versus-model are for two servers: add --versus-target")

    def run(self) -> int:
        from ...benchmarks.serve import ServePlan, run

        plan = ServePlan(
            target=self.target,
            pattern=self.pattern,
            requests=self.requests,
            warm_up=self.warm_up,
            burst_size=self.burst_size,
            prompt_lengths=self.prompt_lengths,
            output_lengths=self.output_lengths,
            token_ids=self.token_ids,
            max_length=self.max_length,
            seed=self.seed,
            slo_ms={"ttft": self.slo_ttft_ms, "tpot": self.slo_tpot_ms, "e2e": self.slo_e2e_ms},
            timeout_s=self.timeout_s,
            ignore_eos=self.ignore_eos,
            model=self.model,
            versus_target=self.versus_target,
            versus_model=self.versus_model,
            pairs=1 if self.versus_target is None else self.pairs or PAIRS,
            channel=self.channel,
        )
        return finish(run(plan, numbers("load", self.load), self.plot), self.as_json)


def check_target(target: str, model: str | None, channel: ChannelConfig) -> None:
    """Raises RefusedError unless gRPC or HTTP can be spoken there."""
    if target.startswith("http://") and channel.is_encrypted:
        raise RefusedError(f"target={target!r} is in the clear; --tls flags are for https:// and gRPC")
    if "://" in target and not target.startswith(SCHEMES):
        raise RefusedError(f"target={target!r} must be host:port (gRPC), http://... or https://...")
    if model is not None and "://" not in target:
        raise RefusedError(f"model={model!r} is for http:// targets; over gRPC a server has one model")
