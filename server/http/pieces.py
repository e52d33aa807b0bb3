"""What has come of each choice: of a whole answer, or since the chunk before."""

from collections import defaultdict
from dataclasses import dataclass, field

from ..delivery.mailbox import Batch
from ..dialects.parts import CallPart, joined
from ..request.events import Event, TokenLogprob


@dataclass
class Piece:
    """Of one choice."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One a token, if asked for."""
    starts: list[int] = field(default_factory=list)
    """Where in the choice's whole text each token's text begins (characters)."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    stopped_by: str | int | None = None
    echoed: int = 0
    """How many of the tokens are the prompt's."""

    def grow(self, event: Event) -> None:
        self.starts += event.starts
        self.text += event.text
        self.reasoning += event.reasoning
        if event.calls:
            self.calls = joined(self.calls + event.calls)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.stopped_by = event.finish_reason.value, event.stopped_by


Pieces = defaultdict[int, Piece]
"""By the number of the choice: prompt * n + sample."""


def no_pieces() -> Pieces:
    return defaultdict(Piece)


def grow(pieces: Pieces, batch: Batch, n: int) -> None:
    """Adds what `batch` brings; `n` samples of each prompt."""
    for number, event in batch:
        pieces[number * n + event.index].grow(event)
