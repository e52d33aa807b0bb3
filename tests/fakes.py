"""An engine whose answers you can compute in your head: the next token is the last one plus one, up to the stop token.

Text is one token per byte. The bytes of a few long characters follow one another, so that counting up writes them:
"a" answers "bcd...", "w" answers "xyz" and stops, token 199 answers the bytes of "é€😀".
"""

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from slipstream.engine_impl.api import Allowed, Opening, Piece, Sizes
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.params import MAX_LOGPROBS
from slipstream.engine_impl.text.chat import END, Chat, ChatPrompt, TemplateFacts

STOP_ID = ord("z") + 1
CONTROL, CONTROL_ID = "<|control|>", ord("e")
"""A control token, though decoding shows it as an e."""
BEFORE_LONG = 199
LONG_TEXT = "é€😀"
VOCAB_SIZE = 256

BYTE_OF_ID = {i: i for i in range(128)} | {BEFORE_LONG + 1 + i: byte for i, byte in enumerate(LONG_TEXT.encode())}


class FakeMatcher:
    """Its grammar is a text: the only answer there is. "*" in it is any token."""

    def __init__(self, text: str) -> None:
        self.text, self.error, self.is_over = text, "", False

    def copy(self) -> "FakeMatcher":
        return FakeMatcher(self.text)

    def take(self, token_id: int) -> None:
        if not self.text or self.text[0] not in ("*", chr(token_id)):
            self.error = f"{chr(token_id)!r} does not come before {self.text!r}"
        self.text = self.text[1:]

    def allowed(self, end_ids: Iterable[int]) -> np.ndarray:
        self.is_over = not (self.error or self.text)
        may_come_V = np.zeros(VOCAB_SIZE, bool)
        if self.text:
            may_come_V[slice(None) if self.text[0] == "*" else ord(self.text[0])] = True
        else:
            may_come_V[list(end_ids)] = True
        return np.packbits(may_come_V, bitorder="little").view(np.uint32)


class FakeTokenizer:
    vocab_size = VOCAB_SIZE
    bos_id: int | None = None
    eos_id: int | None = STOP_ID
    first_ids: tuple[int, ...] = ()
    stop_ids = frozenset({STOP_ID})
    chat_template: str | None = "{{ messages }}"

    def __init__(self, template_facts: TemplateFacts = TemplateFacts()) -> None:  # noqa: B008
        self.template_facts = template_facts
        self.chats: list[Chat] = []
        """All that were encoded."""

    def encode(self, text: str, at_most: int | None = None, *, with_first: bool = True) -> list[int]:
        return [*(self.first_ids if with_first else ()), *text.encode()]

    def token(self, token_id: int) -> str:
        return CONTROL if token_id == CONTROL_ID else self.decode([token_id])

    def control_id(self, text: str) -> int | None:
        return CONTROL_ID if text == CONTROL else None

    def decode(self, token_ids: Sequence[int], *, with_control: bool = False) -> str:
        return bytes(BYTE_OF_ID.get(token_id, ord("?")) for token_id in token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([BYTE_OF_ID.get(token_id, ord("?"))])

    def encode_chat(self, chat: Chat, at_most: int | None = None) -> ChatPrompt:
        self.chats.append(chat)
        text = self.render_chat(chat)
        return ChatPrompt(self.encode(text), text[-END:])

    def render_chat(self, chat: Chat) -> str:
        """Every content, and every role's first letter before it."""
        return "".join(f"<{turn.role[:1]}>{turn.content}" for turn in chat.turns)

    def stream(self, shown: Collection[str] = ()) -> "FakeTextStream":
        return FakeTextStream(self)

    def matcher(self, grammar: str) -> FakeMatcher:
        """The one answer is the grammar itself, or what `start` is, without its quotes; of any schema it is "[]"."""
        if "bad" in grammar:
            raise RefusedError("the grammar cannot be compiled: it is bad")
        if grammar.startswith("{"):
            (form,) = json.loads(grammar)["grammars"]
            grammar = form["lark_grammar"].removeprefix("start: ")[1:-1] if "lark_grammar" in form else "[]"
        return FakeMatcher(grammar)

    def prepare_grammars(self) -> None:
        pass


class FakeTextStream:
    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self._tokenizer, self._pending = tokenizer, []

    def feed(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\ufffd"):
            return ""
        self._pending = []
        return text

    def finish(self) -> str:
        return self._tokenizer.decode(self._pending)


def nearest_allowed(token: int, word_W: np.ndarray) -> int:
    """The token, or the first one behind it, round the vocabulary, that may come."""
    allowed = np.flatnonzero(np.unpackbits(word_W.view(np.uint8), bitorder="little"))
    return int(allowed[np.searchsorted(allowed, token) % len(allowed)])


class FakeArray:
    """A device array: asking for it is quick, reading it waits until the device has come so far."""

    def __init__(self, value: np.ndarray, copy: Callable[[], None], wait: Callable[[], None]) -> None:
        self._value, self._copy, self._wait, self._copied = value, copy, wait, False

    def copy_to_host_async(self) -> None:
        self._copy()
        self._copied = True

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        assert self._copied, "read without copy_to_host_async()"
        self._wait()
        return self._value


class FakeDevice:
    """A device of JAX's that tells nothing of its memory, as CPUs do."""

    def memory_stats(self) -> None:
        return None


@dataclass(frozen=True)
class FakeAdapter:
    """Answers count up by more than one: by the number that its path ends with more."""

    path: str
    rank: int = 4
    bytes: int = 1 << 20
    device_bytes: int = 2 << 20

    @property
    def shift(self) -> int:
        return int(self.path.rpartition("-")[2])


@dataclass
class FakeState:
    row_PR: np.ndarray
    """The cache: a row is its token; -1 until one is stored."""
    adapter_B: np.ndarray
    """Each slot's."""
    token_B: np.ndarray
    """The last token, not in the cache."""
    length_B: np.ndarray
    donated: bool = False

    def donate(self) -> "FakeState":
        assert not self.donated, "this state was donated"
        self.donated = True
        return FakeState(self.row_PR, self.adapter_B, self.token_B, self.length_B)


@dataclass
class FakeResult:
    """A token's log-probability is minus an eighth of its id; the likeliest are itself and those that follow it, each
    one less likely by 1."""

    token_BW: FakeArray
    count_B: FakeArray
    drafted_B: FakeArray
    agreed_B: FakeArray
    logprob_BW: FakeArray
    top_token_BWP: FakeArray
    top_logprob_BWP: FakeArray


@dataclass
class FakePrefix:
    pieces: Sequence[Piece]
    texts: list[list[int]]
    """Of each piece, up to its end."""
    logprob_NT: FakeArray
    top_token_NTP: FakeArray
    top_logprob_NTP: FakeArray
    tokens: list[int]
    """What follows each text, once chosen; -1 for one that is not complete."""
    ready: Callable[[], bool]
    times_chosen: int = 0

    def is_ready(self) -> bool:
        return self.ready()


class Unpaced(threading.Semaphore):
    """Every step may go on at once."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        return True


@dataclass
class FakeEngine:
    """Faults and pace are set from outside; `log` tells the calls in order."""

    max_concurrent_decodes: int = 2
    max_prefill_length: int = 16
    cache_length: int = 256
    page_rows: int = 16
    prefill_chunk: int = 16
    batch: int = 1
    """Prompts of one piece that go into one prefill."""
    prefill_lengths: tuple[int, ...] = ()
    """Of a piece that is prefilled alone, below `prefill_chunk`."""
    pages: int = 0
    """0: as many as all slots' longest requests need."""
    table_entries: int = 0
    """Likewise."""
    carries_pieces: bool = False
    """Whether a step carries a piece along."""
    prefills_apart: bool = False
    is_prefix_ready: Callable[[], bool] = lambda: True
    """Asked for each prefix."""
    step_s: float = 0.0
    widths: tuple[int, ...] = (1,)
    """A real engine's begin with 1."""
    widest: Callable[[int], int] = lambda slots: 99
    """The widest step of so many slots."""
    count_of_step: Callable[[int], int] | None = None
    """How many tokens a step brings, by its number: so many less one of its drafts are right; None: all."""
    model_name: str = "fake"
    on_prefill: Callable[[Sequence[int]], object] = lambda prompt: None
    """Called with every prompt; may raise."""
    on_generate: Callable[[int], None] = lambda step: None
    """Called with every step's number from 0; may raise."""
    on_call: Callable[[str], None] = lambda call: None
    """Called with everything that is written to `log`, and with "copy" for every array asked for; may raise."""
    late_errors: dict[int, Exception] = field(default_factory=dict)
    """By step: errors that show only when its tokens are read, as on a real device."""
    pace: threading.Semaphore = field(default_factory=Unpaced)
    """Reading a step's tokens takes one from it."""
    log: list[str] = field(default_factory=list)
    samplings: list[Any] = field(default_factory=list)
    steps: int = 0
    widths_used: list[int] = field(default_factory=list)
    """Of each step."""
    states_made: int = 0
    max_adapters: int = 0
    on_read_adapter: Callable[[str], None] = lambda path: None
    """Called with every adapter's path; may raise, or take its time."""
    at_index: dict[int, "FakeAdapter"] = field(default_factory=dict)
    """Adapters on the devices."""
    devices: tuple[FakeDevice, ...] = (FakeDevice(),)
    on_reach: Callable[[int], int] = lambda length: 0
    """Which angles a text takes that may come to so many tokens: what is computed does not depend on it."""

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            slots=self.max_concurrent_decodes,
            cache_length=self.cache_length,
            max_prefill_length=self.max_prefill_length,
            prefill_chunk=self.prefill_chunk,
            prefill_batch=(min(2, self.batch), self.batch, self.prefill_chunk),
            prefill_lengths=(*self.prefill_lengths, self.prefill_chunk),
            skips_padding=False,
            tokens_per_step=self.widths[-1],
            page_rows=self.page_rows,
            pages=self.pages,
            pages_per_slot=self.pages_per_slot,
            table_entries=self.table_entries,
            max_adapters=self.max_adapters,
            vocab_size=FakeTokenizer.vocab_size,
        )

    def widths_of(self, slots: int) -> tuple[int, ...]:
        return tuple(width for width in self.widths if width <= self.widest(slots))

    def reach_of(self, length: int) -> int:
        return self.on_reach(length)

    @property
    def pages_per_slot(self) -> int:
        return -(-self.cache_length // self.page_rows)

    def __post_init__(self) -> None:
        whole = self.max_concurrent_decodes * self.pages_per_slot
        self.pages, self.table_entries = self.pages or whole, self.table_entries or whole

    def get_tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def init_decode_state(self) -> FakeState:
        self.states_made += 1
        row_PR = np.full((self.pages, self.page_rows), -1)
        token_B, length_B = np.full((2, self.max_concurrent_decodes), -1)
        return FakeState(row_PR, np.zeros(self.max_concurrent_decodes, int), token_B, length_B)

    def read_adapter(self, path: str) -> "FakeAdapter":
        self.on_read_adapter(path)
        return FakeAdapter(path)

    def without_adapters(self, params: Any) -> Any:
        self._call("without_adapters")
        self.at_index.clear()
        return params

    def put_adapter(self, params: Any, index: int, adapter: "FakeAdapter") -> Any:
        assert 1 <= index <= self.max_adapters
        self._call(f"put_adapter {index}")
        self.at_index[index] = adapter
        return params

    def shift(self, index: int) -> int:
        """What the adapter adds to each token beside one."""
        return 0 if index == 0 else self.at_index[index].shift

    def warm_up(self, params: Any, decode_state: FakeState) -> FakeState:
        self.log.append("warm_up")
        return decode_state.donate()

    def next_token(self, text: Sequence[int]) -> int:
        """What follows a text."""
        return text[-1] + 1

    def prefill(self, params: Any, decode_state: FakeState, pieces: Sequence[Piece]) -> FakePrefix:
        assert not decode_state.donated, "this state was donated"
        assert len(pieces) <= self.batch
        texts = []
        for piece in pieces:
            assert piece.start % self.page_rows == 0
            assert 0 < len(piece.token_T) <= self.prefill_chunk
            row_S = decode_state.row_PR[piece.page_J].reshape(-1)[: piece.start]
            assert (row_S >= 0).all(), "rows are read that were never stored"
            texts.append([*row_S.tolist(), *piece.token_T.tolist()])
            self._call(f"prefill {FakeTokenizer().decode(piece.token_T.tolist())}")
            self.on_prefill(piece.token_T.tolist())
        logprob_NT = np.zeros((len(pieces), self.prefill_chunk), np.float32)
        for logprob_T, piece in zip(logprob_NT, pieces, strict=True):
            if piece.logprobs is not None:
                next_T = np.append(piece.token_T[1:], piece.next_id)
                logprob_T[: len(next_T)] = -next_T / np.float32(8)
        token_NT, top = np.rint(-logprob_NT * 8).astype(np.int32), np.arange(MAX_LOGPROBS)
        tops = self._array(token_NT[..., None] + top), self._array(logprob_NT[..., None] - top)
        return FakePrefix(pieces, texts, self._array(logprob_NT), *tops, [-1] * len(pieces), self.is_prefix_ready)

    def first_tokens(self, prefix: FakePrefix, openings: Sequence[Opening | None]) -> tuple[FakePrefix, FakeResult]:
        """Each time that it is asked anew the token is ten later."""
        if prefix.times_chosen:
            self._call("first_tokens")
        tokens = []
        for piece, text, opening in zip(prefix.pieces, prefix.texts, openings, strict=True):
            if opening is not None:
                assert list(opening.text) == text
                self.samplings.append(opening.sampling)
            token = -1 if opening is None else self.next_token(text) + 10 * prefix.times_chosen
            if opening is not None:
                token += self.shift(piece.adapter)
            if opening is not None and opening.allowed_W is not None:
                token = nearest_allowed(token, opening.allowed_W)
            tokens.append(token)
        chosen = replace(prefix, tokens=tokens, times_chosen=prefix.times_chosen + 1)
        return chosen, self._result(np.array(tokens)[:, None])

    def insert(
        self, prefix: FakePrefix, decode_state: FakeState, slots: Sequence[int | None], page_NJ: np.ndarray
    ) -> FakeState:
        state = decode_state.donate()
        for piece, text, token, slot, page_J in zip(
            prefix.pieces, prefix.texts, prefix.tokens, slots, page_NJ, strict=True
        ):
            self._call("insert" if slot is None else f"insert {slot}")
            at_T = np.arange(piece.start, len(text))
            state.row_PR[page_J[at_T // self.page_rows], at_T % self.page_rows] = piece.token_T
            if slot is not None:
                assert token >= 0
                state.token_B[slot], state.length_B[slot] = token, len(text)
                state.adapter_B[slot] = piece.adapter
        return state

    def generate(
        self,
        params: Any,
        decode_state: FakeState,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        allowed: Allowed | None = None,
        width: int = 1,
    ) -> tuple[FakeState, FakeResult]:
        assert width in (1, *self.widths)
        width = min(width, self.widest(len(slot_N)))
        is_named_N = slot_N < self.max_concurrent_decodes
        slot_N, page_NJ = slot_N[is_named_N], page_NJ[is_named_N]
        step, self.steps = self.steps, self.steps + 1
        state = decode_state.donate()
        self._call("generate")
        self.on_generate(step)
        right = width if self.count_of_step is None else self.count_of_step(step) - 1
        count_N = np.full(len(slot_N), min(right + 1, width))
        forced: dict[int, list[int]] = {}
        if allowed is not None:
            for row, forced_F in zip(allowed.row_C.tolist(), allowed.forced_CF, strict=True):
                forced[row] = forced_F[forced_F >= 0].tolist()
                count_N[row] = min(len(forced[row]) + 1, width)
        token_NW = np.full((len(slot_N), width), -1)
        for at in range(width):
            token_N, length_N = state.token_B[slot_N], state.length_B[slot_N]
            live_N = (length_N < self.cache_length) & (at < count_N)
            page_N = page_NJ[np.arange(len(slot_N)), np.minimum(length_N // self.page_rows, page_NJ.shape[1] - 1)]
            state.row_PR[page_N[live_N], length_N[live_N] % self.page_rows] = token_N[live_N]
            state.length_B[slot_N] = length_N = length_N + live_N
            next_N = token_N + 1
            next_N[live_N] = self.next_tokens(state, token_N[live_N], length_N[live_N], page_NJ[live_N])
            if state.adapter_B.any():
                next_N = next_N + [self.shift(index) for index in state.adapter_B[slot_N]]
            for row, word_W in () if allowed is None else zip(allowed.row_C, allowed.word_CW, strict=True):
                if at < len(forced[row]):
                    next_N[row] = forced[row][at]
                else:
                    next_N[row] = nearest_allowed(int(next_N[row]), word_W)
            state.token_B[slot_N[live_N]] = token_NW[live_N, at] = next_N[live_N]
        self.widths_used.append(width)
        return state, self._result(token_NW, lambda: self._wait(step), agreed=min(right, width))

    def carries(self, slots: int, lengths: Sequence[int]) -> bool:
        return self.carries_pieces and slots > 0 and len(lengths) == 1

    def carry(
        self,
        params: Any,
        decode_state: FakeState,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        pieces: Sequence[Piece],
        allowed: Allowed | None = None,
    ) -> tuple[FakeState, FakeResult, FakePrefix]:
        assert self.carries(len(slot_N), [len(piece.token_T) for piece in pieces])
        prefix = self.prefill(params, decode_state, pieces)
        return *self.generate(params, decode_state, slot_N, page_NJ, allowed), prefix

    def next_tokens(
        self, state: FakeState, token_N: np.ndarray, length_N: np.ndarray, page_NJ: np.ndarray
    ) -> np.ndarray:
        """What follows the texts in the cache, without a look at the cache."""
        return (token_N + 1) % VOCAB_SIZE

    def _result(self, token_BW: np.ndarray, wait: Callable[[], None] = lambda: None, agreed: int = 0) -> FakeResult:
        logprob_BW, top = -token_BW / np.float32(8), np.arange(MAX_LOGPROBS)
        return FakeResult(
            self._array(token_BW.astype(np.int32), wait),
            self._array((token_BW >= 0).sum(axis=1).astype(np.int32)),
            self._array(np.full(len(token_BW), token_BW.shape[1], np.int32)),
            self._array(np.full(len(token_BW), agreed, np.int32)),
            self._array(logprob_BW),
            self._array(token_BW[..., None] + top),
            self._array(logprob_BW[..., None] - top),
        )

    def _array(self, value: np.ndarray, wait: Callable[[], None] = lambda: None) -> FakeArray:
        return FakeArray(value, lambda: self.on_call("copy"), wait)

    def _call(self, call: str) -> None:
        self.log.append(call)
        self.on_call(call)

    def _wait(self, step: int) -> None:
        assert self.pace.acquire(timeout=10)
        time.sleep(self.step_s)
        if step in self.late_errors:
            raise self.late_errors[step]
