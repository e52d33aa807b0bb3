"""One request to a server, with the times at which its tokens came."""

from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from .workload import LoadRequest

Status = Literal["completed", "rejected", "failed"]
CONNECT_S = 5.0
"""How long a server may take to answer the first knock (seconds)."""


@dataclass(kw_only=True)
class Record:
    """What became of a request. Times are seconds of one clock."""

    due: float
    """When it should have been sent: waiting for a busy client counts as latency."""
    token_times: list[float] = field(default_factory=list)
    """One for each message that carried tokens."""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt, what the server found in a cached prefix; None where it does not tell."""
    token_ids: list[int] = field(default_factory=list)
    """Of the answer; over gRPC alone."""
    accepted_draft_tokens: int = 0
    """Of the answer, what came from drafts; likewise."""
    end: float = 0.0
    status: Status = "failed"
    detail: str = ""

    @property
    def ttft_ms(self) -> float | None:
        """Until the first token; None of an answer without one."""
        return (self.token_times[0] - self.due) * 1000 if self.token_times else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of the tokens after the first; None when there are none."""
        if self.tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) * 1000 / (self.tokens - 1)

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between messages that carried tokens: what a reader of the stream waits."""
        pairs = zip(self.token_times, self.token_times[1:], strict=False)
        return [(after - before) * 1000 for before, after in pairs]

    @property
    def e2e_ms(self) -> float:
        """Until the stream's end."""
        return (self.end - self.due) * 1000


class Caller(Protocol):
    """A way to a server: `async with caller:`, then any number of calls at a time."""

    async def __aenter__(self) -> Self:
        """Raises UnavailableError when nobody answers at the target."""
        ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def call(self, ask: LoadRequest, record: Record) -> None:
        """Sends it now, reads its answer to the end and fills in the record meanwhile. A refusal is a result, not an
        error."""
        ...
