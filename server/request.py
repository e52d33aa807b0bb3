"""A request: what the orchestrator is asked for, what it reports back, and what it would refuse."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ..engine_impl.errors import RefusedError
from ..engine_impl.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine

GREEDY = SamplingParams()


class FinishReason(Enum):
    """How a request ended that did not fail."""

    STOP = "stop"
    """The model ended its answer."""
    LENGTH = "length"
    """max_tokens reached."""
    CANCELLED = "cancelled"
    """The caller left, or the server stopped."""


@dataclass(frozen=True)
class Event:
    """What happened to a request. Its last event, and no other, has a finish reason or an error."""

    token_ids: tuple[int, ...] = ()
    """New tokens, without the stop token."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt on its way to an answer."""

    prompt_ids: Sequence[int]
    max_tokens: int
    deliver: Callable[[Event], object]
    """Called from the orchestrator's thread, in order; must not block."""
    sampling: SamplingParams = GREEDY
    id: str = field(default_factory=lambda: secrets.token_hex(6))

    # The orchestrator's notes.
    slot: int | None = None
    """Where it decodes; None while it waits, and again when its last step has been started."""
    planned: int = 0
    """Tokens that have been asked of the engine; ahead of `delivered` by the steps in flight."""
    delivered: int = 0
    cancelled: bool = False
    """Set by any thread, read by the orchestrator's."""
    done: bool = False
    """Its last event is out."""


@dataclass(frozen=True)
class Limits:
    """What the engine can take (tokens)."""

    vocab_size: int
    max_prefill_length: int
    cache_length: int

    @classmethod
    def of(cls, engine: "Engine") -> "Limits":
        return cls(engine.get_tokenizer().vocab_size, engine.max_prefill_length, engine.cache_length)

    def check(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """Raises RefusedError for a request that the engine cannot answer."""
        check_max_tokens(max_tokens)
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


def sampling_params(temperature: float, top_k: int, top_p: float, seed: int | None) -> SamplingParams:
    """Checked parameters; a request without a seed draws one, so that asking twice gives two answers."""
    if seed is None:
        seed = secrets.randbits(32) if temperature else 0
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
