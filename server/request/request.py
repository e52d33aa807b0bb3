"""A request: what the orchestrator is asked for, what it reports back, and what it would refuse."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from ...engine_impl.errors import RefusedError
from ...engine_impl.sampling.params import MAX_SEED, SamplingParams

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine

GREEDY = SamplingParams()

MAX_STOP_STRINGS = 16
"""Stop strings of one request (count)."""
MAX_STOP_LENGTH = 256
"""Longest stop string (characters)."""
MAX_STOP_TOKEN_IDS = 16
"""Stop token ids of one request, the model's own not counted."""
MAX_TOKEN_ID = 2**31 - 1
"""No token id is beyond it: arrays of them are i32."""
MAX_PRIORITY = 10
"""Priorities go from minus this to this: bounded, so that waiting beats any of them in the end."""

SEED_STRIDE = 0x9E3779B9
"""2^32 over the golden ratio, as Weyl sequences use it: far apart, and no two of 2^32 samples share a seed."""


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
    generated_tokens: int
    """Of all samples together, without stop tokens."""
    queue_ms: float | None
    """Until its prefill began."""
    ttft_ms: float | None
    """Until its first token, the wait in the queue included."""
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened to a sample of a request."""

    index: int = 0
    """Which sample."""
    text: str = ""
    """What it adds to the text: whole characters, never a part of a stop string."""
    token_ids: tuple[int, ...] = ()
    """New tokens, without the stop token."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of token_ids, if asked for."""
    prompt_logprobs: tuple[float, ...] | None = None
    """In the request's first event, if asked for: one for each token of the prompt; the first is 0 by definition."""
    finish_reason: FinishReason | None = None
    """In the sample's last event."""
    usage: Usage | None = None
    """In the request's last event, if it did not fail."""
    error: Exception | None = None
    """Why the whole request failed."""

    @property
    def is_last(self) -> bool:
        """Every request gets exactly one last event, whatever becomes of it."""
        return self.usage is not None or self.error is not None


@dataclass(eq=False)
class Sample:
    """One answer to a request."""

    request: "Request"
    index: int
    slot: int | None = None
    """Where it decodes, the orchestrator's note. None while it waits, and again once its last step is started."""
    delivered: int = 0
    """Tokens the caller has got, delivery's note."""
    done: bool = False
    """Its last event is out, delivery's note."""

    @property
    def sampling(self) -> SamplingParams:
        """The request's, with a seed of its own; the first sample has the request's."""
        asked = self.request.sampling
        return replace(asked, seed=(asked.seed + self.index * SEED_STRIDE) & MAX_SEED) if self.index else asked


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt on its way to its answers. Raises RefusedError for values that no server takes."""

    prompt_ids: Sequence[int]
    max_tokens: int
    """Longest answer (tokens)."""
    deliver: Callable[[Event], object]
    """Called from one thread of the orchestrator's, in order; must not block."""
    sampling: SamplingParams = GREEDY
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """Do not stop at the model's own stop tokens."""
    num_samples: int = 1
    """Answers from one prefill, each with a slot of its own."""
    prompt_logprobs: bool = False
    priority: int = 0
    """Higher goes first; see RequestQueue."""
    deadline: float | None = None
    """When it is worth nothing any more (s of time.monotonic())."""
    id: str = field(default_factory=lambda: secrets.token_hex(6))

    queued_at: float | None = None
    """s of time.monotonic(), like the stamps below; None: has not happened."""
    started_at: float | None = None
    """Its prefill began."""
    first_token_at: float | None = None
    ended_at: float | None = None
    """Its last event is out."""
    samples: list[Sample] = field(init=False)

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)
        check_stops(self.stop_strings, self.stop_token_ids)
        check_num_samples(self.num_samples)
        check_priority(self.priority)
        self.samples = [Sample(self, index) for index in range(self.num_samples)]

    @property
    def slots_needed(self) -> int:
        """A single token comes from the prefill and needs none."""
        return self.num_samples if self.max_tokens > 1 else 0

    @property
    def delivered(self) -> int:
        """Tokens the caller has got, of all samples."""
        return sum(sample.delivered for sample in self.samples)

    @property
    def done(self) -> bool:
        return self.ended_at is not None


@dataclass(frozen=True)
class Limits:
    """What the engine can take (tokens; slots)."""

    vocab_size: int
    max_prefill_length: int
    cache_length: int
    slots: int

    @classmethod
    def of(cls, engine: "Engine") -> "Limits":
        return cls(
            engine.get_tokenizer().vocab_size,
            engine.max_prefill_length,
            engine.cache_length,
            engine.max_concurrent_decodes,
        )

    def check(self, prompt_ids: Sequence[int], max_tokens: int, num_samples: int = 1) -> None:
        """Raises RefusedError for a request that the engine cannot answer."""
        check_max_tokens(max_tokens)
        check_slots(num_samples, self.slots)
        length = len(prompt_ids)
        if not length:
            raise RefusedError("the prompt is empty; send at least one token")
        if length > self.max_prefill_length:
            raise RefusedError(
                f"the prompt has {length} tokens, the largest prefill bucket {self.max_prefill_length}; "
                "shorten the prompt or serve with a larger --max-prefill-length"
            )
        if length + max_tokens > self.cache_length:
            raise RefusedError(
                f"a prompt of {length} tokens and {max_tokens=} exceed cache_length={self.cache_length}; "
                f"ask for at most {self.cache_length - length} tokens or serve with a larger --cache-length"
            )
        for position, token_id in enumerate(prompt_ids):
            if not 0 <= token_id < self.vocab_size:
                raise RefusedError(
                    f"token id {token_id} at position {position} is outside the vocabulary; "
                    f"ids go from 0 to {self.vocab_size - 1}"
                )


def check_max_tokens(max_tokens: int) -> None:
    """Raises RefusedError unless positive."""
    if max_tokens <= 0:
        raise RefusedError(f"{max_tokens=} must be at least 1")


def check_num_samples(num_samples: int) -> None:
    """Raises RefusedError unless positive."""
    if num_samples <= 0:
        raise RefusedError(f"{num_samples=} must be at least 1")


def check_slots(num_samples: int, slots: int) -> None:
    """Raises RefusedError when so many samples can never run together."""
    check_num_samples(num_samples)
    if num_samples > slots:
        raise RefusedError(
            f"{num_samples=} needs as many slots and the server has {slots}; "
            "ask for fewer samples or serve with more --slots"
        )


def check_priority(priority: int) -> None:
    """Raises RefusedError outside the range."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise RefusedError(f"{priority=} must be from {-MAX_PRIORITY} (last) to {MAX_PRIORITY} (first)")


def check_stops(stop_strings: Sequence[str], stop_token_ids: Sequence[int]) -> None:
    """Raises RefusedError for too many, too long or empty ones."""
    if len(stop_strings) > MAX_STOP_STRINGS:
        raise RefusedError(f"{len(stop_strings)} stop strings are too many; send at most {MAX_STOP_STRINGS}")
    for stop in stop_strings:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise RefusedError(
                f"a stop string of {len(stop)} characters must have from 1 to {MAX_STOP_LENGTH}: {stop[:40]!r}"
            )
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise RefusedError(f"{len(stop_token_ids)} stop token ids are too many; send at most {MAX_STOP_TOKEN_IDS}")
    for token_id in stop_token_ids:
        if not 0 <= token_id <= MAX_TOKEN_ID:
            raise RefusedError(f"stop token id {token_id} must be from 0 to {MAX_TOKEN_ID}")


def drawn_seed(temperature: float, seed: int | None) -> int:
    """A request without a seed draws one, so that asking twice gives two answers."""
    if seed is not None:
        return seed
    return secrets.randbits(32) if temperature else 0
