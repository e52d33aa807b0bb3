"""The flags of `slipstream bench speculate`."""

from dataclasses import dataclass

from ...engine_impl.errors import RefusedError
from .flags import Hosted, Json, Pairs, Seed, check_positive, numbers


@dataclass(frozen=True, kw_only=True)
class SpeculateOptions(Hosted):
    """Speculation on beside off: two servers, the same answers in turns (A B A B)."""

    cache_length: int = 512
    load: str = "1,8"
    """Requests in flight (requests); a comma list is run in turn."""
    answers: str = "copies,random,schema"
    """Of which kinds: text that copies, random tokens, JSON in a schema with long keys (a comma list)."""
    requests: int = 8
    """Requests of one block (requests)."""
    max_tokens: int = 96
    """Longest answers (tokens)."""
    draft_model: str | None = None
    """As `serve` takes it. Default: drafts come from the request's own text alone."""
    pairs: Pairs = 3
    seed: Seed = 0
    timeout_s: float = 120.0
    """How long one request may take (seconds)."""
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "requests", "max_tokens", "pairs", "timeout_s")
        _ = self.engine  # refused before the slow import
        for load in self.loads:
            if load != int(load) or load < 1:
                raise RefusedError(f"load={load} must be a whole number of requests in flight")

    @property
    def kinds(self) -> list[str]:
        """Of answers."""
        return self.answers.split(",")

    @property
    def loads(self) -> list[float]:
        """Each load that is run."""
        return numbers("load", self.load)
