"""A request: what the orchestrator is asked for, what it reports back, and what it would refuse."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from ...engine_impl.errors import RefusedError, TooLongError
from ...engine_impl.sampling.params import MAX_SEED, SamplingParams
from ...engine_impl.text.chat import Chat, ChatPrompt
from ..dialects.parts import CallPart
from ..dialects.syntax import AnswerSyntax
from .adapter import LoadedAdapter
from .constraint import Constraint
from .grammar import Grammar
from .options import AnswerOptions
from .trace import Trace

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine
    from ...engine_impl.api import Tokenizer

SEED_STRIDE = 0x9E3779B9
"""2^32 over the golden ratio, as Weyl sequences use it: far apart, and no two of 2^32 samples share a seed."""


MAX_PROMPTS, MAX_MESSAGES, MAX_PARTS = 2048, 10_000, 1000
"""Prompts of one call, messages of a conversation, parts of a message (count). What is beyond is no request but a way
to keep its reader busy."""


NO_ADAPTERS = "there are no adapters; serve with --max-adapters N"


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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine can take. A request within them can be answered, by a server that has nothing else to do."""

    vocab_size: int
    max_prefill_length: int
    """Longest prompt (tokens)."""
    cache_length: int
    """Prompt and answer of one sample together (tokens)."""
    slots: int
    prefill_chunk: int
    """Of a prompt, that are computed together (tokens)."""
    page_rows: int
    """Of a page (tokens)."""
    pages: int
    table_entries: int
    """Of the page tables of all samples that run."""
    tokens_per_step: int
    """Most that a step brings a sample; 1: nothing drafts."""

    @classmethod
    def of(cls, engine: "Engine") -> "Limits":
        sizes = engine.sizes
        return cls(
            vocab_size=engine.get_tokenizer().vocab_size,
            max_prefill_length=sizes.max_prefill_length,
            cache_length=sizes.cache_length,
            slots=sizes.slots,
            prefill_chunk=sizes.prefill_chunk,
            page_rows=sizes.page_rows,
            pages=sizes.pages,
            table_entries=sizes.table_entries,
            tokens_per_step=sizes.tokens_per_step,
        )

    def ids_of_text(self, tokenizer: "Tokenizer", text: str, *, with_first: bool = True) -> list[int]:
        """Token ids of raw text, as Tokenizer.encode has them. Raises TooLongError for a text that is much too long,
        before all of it is read."""
        try:
            return tokenizer.encode(text, self.max_prefill_length, with_first=with_first)
        except TooLongError as error:
            raise self._too_long(f"more than {self.max_prefill_length}") from error

    def prompt_of_chat(self, tokenizer: "Tokenizer", chat: Chat) -> ChatPrompt:
        """A conversation in the model's form. Raises likewise, and what the chat template refuses."""
        try:
            return tokenizer.encode_chat(chat, self.max_prefill_length)
        except TooLongError as error:
            raise self._too_long(f"more than {self.max_prefill_length}") from error

    def ids_of_prediction(self, tokenizer: "Tokenizer", text: str | None) -> list[int]:
        """Token ids of a prediction, without what texts begin with. Raises RefusedError for one where nothing drafts,
        TooLongError for one that is longer than any answer."""
        if text is None:
            return []
        if self.tokens_per_step == 1:
            raise RefusedError(
                "prediction: this server does not speculate; leave it out or serve with --speculate auto"
            )
        refusal = f"prediction: more than {self.cache_length} tokens, which no answer has here; send a shorter one"
        try:
            token_ids = tokenizer.encode(text, self.cache_length, with_first=False)
        except TooLongError as error:
            raise TooLongError(refusal) from error
        if len(token_ids) > self.cache_length:
            raise TooLongError(refusal)
        return token_ids

    def check_count(self, count: int) -> None:
        """Raises RefusedError for a prompt of so many tokens."""
        if count > self.max_prefill_length:
            raise self._too_long(f"{count}")

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises RefusedError for one that the vocabulary lacks."""
        for position, token_id in enumerate(token_ids):
            self._check_id(token_id, f"token id {token_id} at position {position}")

    @property
    def pool_tokens(self) -> int:
        """What all pages hold."""
        return self.pages * self.page_rows

    @property
    def longest(self) -> int:
        """Prompt and answer of a sample that has the server for itself (tokens)."""
        return self.cache_length if self.cache_length <= self.pool_tokens else self.pool_tokens - self._ahead

    @property
    def _ahead(self) -> int:
        """Rows behind a sample's last token that must have pages: its last step is started while the one before it is
        not read, and of each one token is sure and `tokens_per_step` may come."""
        return 2 * (self.tokens_per_step - 1)

    def check(self, request: Request) -> None:
        """Raises RefusedError for a request that the engine cannot answer."""
        check_slots(request.num_samples, self.slots)
        length, max_tokens = len(request.prompt_ids), request.max_tokens
        if not length:
            raise RefusedError("the prompt is empty; send at least one token")
        self.check_count(length)
        check_room(length, max_tokens, "cache_length", self.cache_length)
        if self.longest < self.cache_length:
            check_room(length, max_tokens, "cache_tokens", self.pool_tokens, self._ahead)
        self._check_start(length, max(1, request.slots_needed))
        self.check_ids(request.prompt_ids)
        for token_id in request.sampling.logit_bias:
            self._check_id(token_id, f"logit_bias: token id {token_id}")

    def _too_long(self, count: str) -> TooLongError:
        flag = "--max-prefill-length" if self.max_prefill_length < self.cache_length else "--cache-length"
        return TooLongError(
            f"the prompt has {count} tokens, at most {self.max_prefill_length} are taken; "
            f"shorten the prompt or serve with a larger {flag}"
        )

    def _check_start(self, length: int, samples: int) -> None:
        """Samples start together: they share the pages before the prompt's last piece, and each has the others and room
        for a step. Later they may run one after the other."""
        each = self._pages_for(min(length + self.tokens_per_step, self.cache_length))
        shared = self._pages_for(length - self.prefill_chunk)
        asked, less = f"num_samples={samples} of a prompt of {length} tokens need", "ask for fewer samples"
        pages, entries = each + (samples - 1) * (each - shared), samples * each
        if pages > self.pages:
            raise RefusedError(
                f"{asked} {pages * self.page_rows} tokens in whole pages to start and exceed "
                f"cache_tokens={self.pool_tokens}; {less} or serve with a larger --cache-tokens"
            )
        if entries > self.table_entries:
            raise RefusedError(
                f"{asked} {entries} entries of page tables, and there are {self.table_entries}; "
                f"{less} or shorten the prompt"
            )

    def _pages_for(self, tokens: int) -> int:
        return max(0, -(-tokens // self.page_rows))

    def _check_id(self, token_id: int, what: str) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RefusedError(f"{what} is outside the vocabulary; ids go from 0 to {self.vocab_size - 1}")


def check_messages(count: int) -> None:
    """Raises RefusedError for a conversation of so many messages."""
    if not count:
        raise RefusedError("messages is empty; send at least one")
    if count > MAX_MESSAGES:
        raise RefusedError(f"messages has {count} entries and may have {MAX_MESSAGES}; send fewer")


def check_room(length: int, max_tokens: int, name: str, tokens: int, ahead: int = 0) -> None:
    """Raises TooLongError when prompt and answer exceed `tokens`, less those that steps need ahead; `name` is what
    bounds them, and its flag's."""
    room = tokens - ahead - length
    if max_tokens > room:
        less = f"ask for at most {room} tokens" if room > 0 else "shorten the prompt"
        kept = f" less {ahead} that steps need ahead" if ahead else ""
        raise TooLongError(
            f"a prompt of {length} tokens and {max_tokens=} exceed {name}={tokens}{kept}; "
            f"{less} or serve with a larger --{name.replace('_', '-')}"
        )


def check_slots(num_samples: int, slots: int) -> None:
    """Raises RefusedError when so many samples can never run together."""
    if num_samples > slots:
        raise RefusedError(
            f"{num_samples=} needs as many slots and the server has {slots}; "
            "ask for fewer samples or serve with more --slots"
        )


def drawn_seed(temperature: float) -> int:
    """For a request without one, so that asking twice gives two answers."""
    return secrets.randbits(32) if temperature else 0
