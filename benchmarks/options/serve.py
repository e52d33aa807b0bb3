"""The flags of `slipstream bench serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...engine_impl.errors import RefusedError
from .flags import check_positive, numbers
from .targets import Targets


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Targets):
    """Load a running server over gRPC or OpenAI's HTTP; report latencies (ms), tokens/s, goodput and refusals."""

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
    prefix_share: int = 0
    """Tokens that all prompts begin with, as a system prompt, on top of --prompt-lengths (tokens)."""
    ignore_eos: bool = False
    """Answers go on past stop tokens to their whole length, so that two servers do the same work. Off by default: real
    answers end, and a server that does not know vLLM's field ignore_eos may refuse it."""
    max_length: int | None = None
    """Prompt and answer together are cut to this (tokens); the server's --cache-length. Default: not cut."""
    slo_ttft_ms: float | None = None
    """Goodput counts a request only if its first token came within this (ms)."""
    slo_tpot_ms: float | None = None
    """Likewise its time per output token (ms)."""
    slo_e2e_ms: float | None = None
    """Likewise its whole answer (ms)."""
    plot: Path | None = None
    """Draw latency against load there (.svg or .png)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for load in self.loads:
            if self.pattern == "closed" and load != int(load):
                raise RefusedError(
                    f"load={load} must be a whole number of requests in flight; or use --pattern poisson"
                )
        check_positive(self, "requests", "burst_size")
        for name in ("warm_up", "prefix_share"):
            if getattr(self, name) < 0:
                raise RefusedError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.max_length is not None and self.max_length < self.prefix_share + 2:
            raise RefusedError(
                f"max_length={self.max_length} must be at least {self.prefix_share + 2}: the shared prefix, one token "
                "of prompt, one of answer"
            )

    @property
    def loads(self) -> list[float]:
        """Each load that is run."""
        return numbers("load", self.load)

    @property
    def slo_ms(self) -> dict[str, float | None]:
        """What a good answer is (ms), by latency; None asks for nothing."""
        return {"ttft": self.slo_ttft_ms, "tpot": self.slo_tpot_ms, "e2e": self.slo_e2e_ms}

    def facts(self) -> dict[str, Any]:
        """For the result's JSON."""
        left_out = {"load", *(f"slo_{name}_ms" for name in self.slo_ms)}
        return {name: value for name, value in super().facts().items() if name not in left_out} | {
            "slo_ms": self.slo_ms
        }
