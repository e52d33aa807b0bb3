"""What a request reports back."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ..dialects.parts import CallPart


class FinishReason(Enum):
    """How an answer ended that did not fail."""

    STOP = "stop"
    """The model ended it, or a stop string or stop token id of the request was met."""
    LENGTH = "length"
    """max_tokens reached."""
    CANCELLED = "cancelled"
    """The caller left."""
    DEADLINE = "deadline"
    """The caller's time was up."""
    TOOL_CALLS = "tool_calls"
    """As STOP, and the answer calls tools."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model held a token, before temperature, penalties and cuts."""

    logprob: float
    """natural logarithm"""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest tokens, the likeliest first; as many as asked for"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request came to. Times are None when it never came so far."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, those that came from a cached prefix."""
    generated_tokens: int
    """Of all samples together, without stop tokens."""
    accepted_draft_tokens: int = 0
    """Drafts that took part in steps and were right."""
    rejected_draft_tokens: int = 0
    """Those that were wrong."""
    queue_ms: float | None
    """Until its prefill began."""
    ttft_ms: float | None
    """Until its first token, the wait in the queue included."""
    total_ms: float


class Event(NamedTuple):
    """What happened to a sample of a request."""

    index: int = 0
    """Which sample."""
    text: str = ""
    """What it adds to the text: whole characters, never a part of a stop string."""
    reasoning: str = ""
    """What it adds to what the model tells itself, where that is told apart."""
    calls: tuple[CallPart, ...] = ()
    """What it adds to the calls of tools, where those are looked for."""
    token_ids: tuple[int, ...] = ()
    """New tokens, without the stop token."""
    starts: tuple[int, ...] = ()
    """Where in the sample's text each of token_ids begins (characters), whatever of it is shown yet."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of token_ids, if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """In the request's first event, if asked for: one for each token of the prompt; the first is 0 by definition."""
    finish_reason: FinishReason | None = None
    """In the sample's last event."""
    stopped_by: str | int | None = None
    """There too: the request's stop string, or stop token id, that ended it; None: the model's own, or nothing did."""
    usage: Usage | None = None
    """In the request's last event, if it did not fail."""
    error: Exception | None = None
    """Why the whole request failed."""

    @property
    def is_last(self) -> bool:
        """Every request gets exactly one last event, whatever becomes of it."""
        return self.usage is not None or self.error is not None
