"""A request: what the orchestrator is asked for."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...engine_impl.sampling.params import MAX_SEED, SamplingParams
from ..dialects.syntax import AnswerSyntax
from .adapter import LoadedAdapter
from .constraint import Constraint
from .events import Event
from .grammar import Grammar
from .options import AnswerOptions
from .trace import Trace

if TYPE_CHECKING:
    from ...engine_impl.api import Tokenizer

SEED_STRIDE = 0x9E3779B9
"""2^32 over the golden ratio, as Weyl sequences use it: far apart, and no two of 2^32 samples share a seed."""


@dataclass(eq=False)
class Sample:
    """One answer to a request."""

    request: "Request"
    index: int
    constraint: Constraint | None = None
    """Its place in the request's grammar."""
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
        assert asked.seed is not None
        return replace(asked, seed=(asked.seed + self.index * SEED_STRIDE) & MAX_SEED) if self.index else asked


@dataclass(eq=False, kw_only=True)
class Request(AnswerOptions):
    """One prompt on its way to its answers. Raises RefusedError for values that no server takes.

    A seed that is left out is drawn here.
    """

    prompt_ids: Sequence[int]
    deliver: Callable[[Event], object]
    """Called from one thread of the orchestrator's, in order; must not block."""
    deadline: float | None = None
    """When it is worth nothing any more (s of time.monotonic())."""
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    prefix_key: str = ""
    """Whose cached prefixes it may share, see prefix_key.py and `shared_key`."""

    reach: int = 0
    """What decides its text's angles, see `Engine.reach_of`: fixed by its prompt and `max_tokens` when it is handed in,
    whatever it comes to."""

    adapter_name: str = ""
    """Of the adapter that it asks for; "" is none."""
    adapter: LoadedAdapter | None = field(default=None, init=False)
    """That one, from `adapt` on."""

    grammar: Grammar | None = None
    """What the answer must look like; None: whatever the model writes."""

    prediction_ids: Sequence[int] = ()
    """Of `prediction`."""

    syntax: AnswerSyntax | None = None
    """How the answer's text is read; None: it is the answer."""

    client: str = ""
    """Who asks, by token or address: clients take turns."""

    queued_at: float | None = None
    """s of time.monotonic(), like the stamps below; None: has not happened."""
    started_at: float | None = None
    """Its prefill began."""
    first_token_at: float | None = None
    ended_at: float | None = None
    """Its last event is out."""
    cached_tokens: int = 0
    """Tokens of the prompt that came from a cached prefix, the orchestrator's note."""
    accepted_draft_tokens: int = 0
    """As in Usage, delivery's notes."""
    rejected_draft_tokens: int = 0
    trace: Trace | None = None
    """None: it is not traced."""
    samples: list[Sample] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling.seed is None:
            self.sampling = replace(self.sampling, seed=drawn_seed(self.sampling.temperature))
        self.samples = [Sample(self, index) for index in range(self.num_samples)]

    def adapt(self, adapter: LoadedAdapter) -> None:
        """The adapter changes its tokens, and so its keys and values: it shares cached prefixes with others of this
        adapter alone."""
        self.adapter = adapter
        self.prefix_key += f"#{adapter.number}"

    @property
    def shared_key(self) -> str:
        """Cached prefixes are shared among requests of the same one: texts of other angles have other rows."""
        return f"{self.prefix_key}@{self.reach}" if self.reach else self.prefix_key

    def constrain(self, tokenizer: "Tokenizer") -> None:
        """Compile the grammar, if there is one, before the request is handed in. It takes its time, and lets other
        threads run. Raises RefusedError for one that cannot be compiled, or takes too much."""
        if self.grammar is not None:
            start, asked = tokenizer.matcher(self.grammar.text), self.sampling
            end_ids = (*asked.stop_token_ids, *(() if asked.ignore_eos else tokenizer.stop_ids))
            for sample in self.samples:
                sample.constraint = Constraint(start.copy(), end_ids)

    @property
    def longest_text(self) -> int:
        """Tokens that are computed at most: of prompt and answer; behind a prompt that one token is asked for, none."""
        return len(self.prompt_ids) + (self.max_tokens if self.max_tokens > 1 else 0)

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


def drawn_seed(temperature: float) -> int:
    """For a request without one, so that asking twice gives two answers."""
    return secrets.randbits(32) if temperature else 0
