"""The engine's face: what the server, the benchmarks and JetStream's adapter know of an engine. Protocols and values.

    prefix = engine.prefill(params, state, [Piece(...)])            # a chunk of a text: its rows aside
    prefix, result = engine.first_tokens(prefix, [Opening(...)])    # for its last chunk: how the text goes on
    state = engine.insert(prefix, state, [slot], page_NJ)           # stores the rows
    state, result = engine.generate(params, state, slot_N, page_NJ)
    state, result, prefix = engine.carry(params, state, slot_N, page_NJ, [Piece(...)])      # generate and prefill

State goes in and comes out; `insert`, `generate` and `carry` donate it, `prefill` reads it. Parameters, prefixes and
states are handles: whoever holds them hands them back unopened. Whose pages are whose, and which slots are live, is the
caller's knowledge: a slot that is not named does not take part in a step. Nothing heavy is imported here.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from .sampling.params import SamplingParams
from .text.chat import Chat, ChatPrompt, TemplateFacts

ParamsT = TypeVar("ParamsT")
"""The weights on the devices."""
PrefixT = TypeVar("PrefixT", bound="Prefix")
"""Pieces of texts after prefill."""
StateT = TypeVar("StateT")
"""All slots between two steps."""


class DeviceArray(Protocol):
    """An array on its way from the device."""

    def copy_to_host_async(self) -> None:
        """Starts the copy; returns at once."""

    def __array__(self) -> np.ndarray:
        """Waits for the device. Raises what went wrong there."""
        ...


class StepResult(Protocol):
    """What a step tells the host: up to W tokens per slot, W its width. A prefill's result has a row for each piece, of
    one token."""

    @property
    def token_BW(self) -> DeviceArray:
        """i32, the step's tokens in order; -1 from `count` on"""
        ...

    @property
    def count_B(self) -> DeviceArray:
        """i32, how many of the slot's tokens are valid; 0 for a slot that is empty or full"""
        ...

    @property
    def drafted_B(self) -> DeviceArray:
        """i32, how many drafts stood behind the slot's last token, up to W: the first W - 1 took part in the step"""
        ...

    @property
    def agreed_B(self) -> DeviceArray:
        """i32, how many of these, the leading ones, are what the model chose: tokens are valid up to the one behind
        the last that took part"""
        ...

    @property
    def logprob_BW(self) -> DeviceArray:
        """f32, each token's log-probability under the model itself; valid where the slot's sampling asks for it"""
        ...

    @property
    def top_token_BWP(self) -> DeviceArray:
        """i32, the P = MAX_LOGPROBS likeliest tokens, likeliest first; valid where the slot asks for more than 0"""
        ...

    @property
    def top_logprob_BWP(self) -> DeviceArray:
        """f32, their log-probabilities"""
        ...


class Prefix(Protocol):
    """Pieces of texts after prefill."""

    def is_ready(self) -> bool:
        """Whether the devices have computed all of it."""
        ...

    @property
    def logprob_NT(self) -> DeviceArray:
        """f32, log p(the token behind it | the text up to it) of each piece's tokens; 0 for padding, for the last
        token of a piece without `next_id`, and where nobody asked"""
        ...

    @property
    def top_token_NTP(self) -> DeviceArray:
        """i32, the P = MAX_LOGPROBS likeliest tokens in its place, likeliest first; valid where a piece asks for more
        than 0"""
        ...

    @property
    def top_logprob_NTP(self) -> DeviceArray:
        """f32, their log-probabilities"""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Piece:
    """Tokens of a text that are computed together."""

    token_T: np.ndarray
    """i32, at least one, at most the engine's `sizes.prefill_chunk`"""
    start: int
    """Tokens of the text before them, whose rows the cache has; a multiple of the page's rows."""
    page_J: np.ndarray
    """i32, the text's pages, its first tokens' first; read up to `start`"""
    next_id: int = -1
    """The token behind them, where it is known and `logprobs` asks for its log-probability too."""
    logprobs: int | None = None
    """Asks for the log-probability of the token behind each, and of so many likeliest ones; None asks for none."""
    adapter: int = 0
    """Index of the adapter that changes the model for the text, see `Engine.put_adapter`; 0 is none."""
    reach: int = 0
    """The text's, see `Engine.reach_of`; all of its pieces say the same."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Opening:
    """How a text goes on behind its last piece."""

    text: Sequence[int] | np.ndarray
    """All its tokens: the prompt, and what the answer has already."""
    prompt_length: int
    """How many of them are the prompt's."""
    sampling: SamplingParams
    allowed_W: np.ndarray | None = None
    """Which tokens may come next, see `Matcher.allowed`; None: all."""
    prediction: Sequence[int] | np.ndarray = ()
    """Tokens that the answer, from its beginning, may well have: drafts. Wrong ones change no token."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Allowed:
    """Which tokens may come next in some rows of a step; in the others all may. A step brings these rows their forced
    tokens, as many as its width has room for, and one behind them."""

    row_C: np.ndarray
    """i32, of `slot_N`"""
    forced_CF: np.ndarray
    """i32, the next tokens, as far as no others may come; -1 behind them"""
    word_CW: np.ndarray
    """u32, which may come behind these, see `Matcher.allowed`"""


class Matcher(Protocol):
    """An answer's place in its grammar: which tokens may come next. One thread at a time."""

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing can follow; known when `allowed` was asked."""
        ...

    @property
    def error(self) -> str:
        """Why nothing can be told of the answer any more; "" if it has not failed."""
        ...

    def copy(self) -> "Matcher":
        """Another answer at the same place."""
        ...

    def take(self, token_id: int) -> None:
        """The answer goes on with this token."""
        ...

    def allowed(self, end_ids: Iterable[int]) -> np.ndarray:
        """u32 [W]: whether token v may come next is bit v % 32 of word v // 32; `end_ids`, which end the answer, may
        where the text is whole. Lets other threads run."""
        ...


class TextStream(Protocol):
    """One answer's tokens to text, as they come."""

    def feed(self, token_id: int) -> str:
        """The whole characters that this token completes."""
        ...

    def finish(self) -> str:
        """What is left at the answer's end."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back. A model without a tokenizer raises RefusedError wherever text is involved."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    """What a text begins and ends with, where the model has such tokens."""
    first_ids: tuple[int, ...]
    """What `encode` puts before every text, mostly a BOS."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""

    def encode(self, text: str, at_most: int | None = None, *, with_first: bool = True) -> list[int]:
        """Token ids of raw text, `first_ids` before them unless told not to. May raise TooLongError for more than
        `at_most` before all of it is read."""
        ...

    def encode_chat(self, chat: Chat, at_most: int | None = None) -> ChatPrompt:
        """A conversation in the model's chat form. Raises likewise."""
        ...

    @property
    def template_facts(self) -> TemplateFacts:
        """What the model's chat template does with what is more than roles and texts."""
        ...

    def control_id(self, text: str) -> int | None:
        """The control token that is written so; None: there is none."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The jinja text of the model's chat form; None without one."""
        ...

    def decode(self, token_ids: Sequence[int], *, with_control: bool = False) -> str:
        """Text of token ids, control tokens left out unless asked for."""
        ...

    def token(self, token_id: int) -> str:
        """How the vocabulary writes a token; empty for an id that it does not have."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for: perhaps part of a character."""
        ...

    def stream(self, shown: Collection[str] = ()) -> TextStream:
        """For one answer. `shown`: control tokens that it writes out."""
        ...

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of an answer in a grammar of llguidance's. Raises RefusedError for one that cannot be
        compiled, or takes too much. It takes its time, and lets other threads run."""
        ...

    def prepare_grammars(self) -> None:
        """Makes what all grammars need, which else the first one does while others wait."""
        ...


class Device(Protocol):
    """One of JAX's devices."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name; None where the platform does not tell."""
        ...


class Adapter(Protocol):
    """A LoRA adapter in the host's memory."""

    @property
    def rank(self) -> int: ...

    @property
    def bytes(self) -> int:
        """Of the host's memory."""
        ...

    @property
    def device_bytes(self) -> int:
        """Of all devices' memory, while it is there."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What an engine takes and holds; nothing of it changes."""

    slots: int
    """Requests that decode together."""
    cache_length: int
    """Prompt and answer of one request together (tokens)."""
    max_prefill_length: int
    """Longest prompt (tokens)."""
    prefill_chunk: int
    """Most tokens of one piece; a multiple of `page_rows`."""
    prefill_batch: tuple[int, int, int]
    """(how many pieces are prefilled together with a gain, how many at most, of how many tokens each at most).

    (1, 1, `prefill_chunk`): only one.
    """
    prefill_lengths: tuple[int, ...]
    """What a piece that is prefilled alone is padded to, ascending (tokens); the last is `prefill_chunk`."""
    skips_padding: bool
    """Whether a prefill takes as long as its tokens do, whatever it is padded to."""
    tokens_per_step: int
    """W: most tokens that a step brings a slot; 1 where nothing drafts."""
    page_rows: int
    """R: tokens of a page."""
    pages: int
    """P: pages of the pool."""
    pages_per_slot: int
    """J: pages of the longest request, the width of a page table."""
    table_entries: int
    """Most pages that the tables of one step's slots may have together, shared ones counted for each."""
    max_adapters: int
    """Adapters that the devices hold at once; 0: none are served."""
    vocab_size: int
    """Token ids are below this."""

    @property
    def cache_tokens(self) -> int:
        """Of all the pool's pages."""
        return self.pages * self.page_rows


class Engine(Protocol[ParamsT, PrefixT, StateT]):
    """A model on its devices, serving `sizes.slots` requests together."""

    model_name: str

    @property
    def sizes(self) -> Sizes: ...

    @property
    def prefills_apart(self) -> bool:
        """Whether pieces are computed on devices of their own, while steps go on. Steps behind the `insert` of a prefix
        that is not ready wait for it."""
        ...

    def widths_of(self, slots: int) -> tuple[int, ...]:
        """Of steps of so many slots, in tokens that they bring each at most, ascending; the first is 1."""
        ...

    @property
    def devices(self) -> Iterable[Device]:
        """What it runs on."""
        ...

    def reach_of(self, length: int) -> int:
        """What decides the angles of a text that may come to `length` tokens, prompt and answer. Texts of different
        reaches have different rows, also where their tokens are the same. Mostly 0: of few models the angles depend
        on it."""
        ...

    def get_tokenizer(self) -> Tokenizer:
        """The model's."""
        ...

    def init_decode_state(self) -> StateT:
        """All slots empty."""
        ...

    def warm_up(self, params: ParamsT, decode_state: StateT) -> StateT:
        """Compiles every program of serving; slots are empty before and after."""
        ...

    def read_adapter(self, path: str) -> Adapter:
        """An adapter from disk or the hub; from any thread, takes its time. Raises RefusedError."""
        ...

    def put_adapter(self, params: ParamsT, index: int, adapter: Any) -> ParamsT:
        """An adapter that `read_adapter` gave onto the devices, at an index from 1 to `sizes.max_adapters`, whatever
        was there: no text that is computed may use it. The parameters are donated as far as they change; what fails
        once they are donated raises AdaptersLostError."""
        ...

    def without_adapters(self, params: ParamsT) -> ParamsT:
        """The parameters with no adapter on the devices, whatever a failure has left of those that were there."""
        ...

    def prefill(self, params: ParamsT, decode_state: StateT, pieces: Sequence[Piece]) -> PrefixT:
        """The pieces' keys and values. The state is read, not donated; `sizes.prefill_batch` tells how many pieces."""
        ...

    def first_tokens(self, prefix: PrefixT, openings: Sequence[Opening | None]) -> tuple[PrefixT, StepResult]:
        """Chooses the token behind each piece; None for one whose text is not complete, of which nothing is told.

        Called again on the prefix that it gave, it chooses anew: another sample of the same prompt.
        """
        ...

    def insert(self, prefix: PrefixT, decode_state: StateT, slots: Sequence[int | None], page_NJ: np.ndarray) -> StateT:
        """Stores the pieces' rows from their `start` on in their texts' pages. A piece with a slot is its text's last:
        the slot takes over the token and the sampling of `first_tokens`, whatever was there.

        The state is donated, the prefix is not.
        """
        ...

    def generate(
        self,
        params: ParamsT,
        decode_state: StateT,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        allowed: Allowed | None = None,
        width: int = 1,
    ) -> tuple[StateT, StepResult]:
        """One decode step of the slots named, in their order; one that is full gets no token. The state is donated.

        Row n of the result belongs to slot_N[n]; rows behind them have a count of 0. `width` is one that some step has:
        the step computes each slot's last token and up to so many drafts less one behind it, fewer where `widths_of` so
        many slots has no such width. A slot's tokens are the same whatever the width; how many a step brings differs.
        `page_NJ` (i32) must have a page for each row that the step may store: up to `width` behind a slot's length.
        Where no slot is named, nothing changes; `sizes.slots` names none, so that a step over nobody may be of any
        size.
        """
        ...

    def carries(self, slots: int, lengths: Sequence[int]) -> bool:
        """Whether a step of so many slots and pieces of so many tokens take less time by `carry` than one behind the
        other."""
        ...

    def carry(
        self,
        params: ParamsT,
        decode_state: StateT,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        pieces: Sequence[Piece],
        allowed: Allowed | None = None,
    ) -> tuple[StateT, StepResult, PrefixT]:
        """`generate` and `prefill` together, of slots and pieces that `carries` said yes to. The state is donated.

        Raises PieceError before anything is started: the state is as it was.
        """
        ...


AnyEngine = Engine[Any, Any, Any]
"""For those who hold no parameters and no state."""
