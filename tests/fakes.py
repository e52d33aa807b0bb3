"""An engine whose answers you can compute in your head: the next token is the last one plus one, up to the stop token.

Text is one token per byte. The bytes of a few long characters follow one another, so that counting up writes them:
"a" answers "bcd...", "w" answers "xyz" and stops, token 199 answers the bytes of "é€😀".
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from slipstream.engine_impl.sampling.params import MAX_LOGPROBS

STOP_ID = ord("z") + 1
BEFORE_LONG = 199
LONG_TEXT = "é€😀"
VOCAB_SIZE = 256

BYTE_OF_ID = {i: i for i in range(128)} | {BEFORE_LONG + 1 + i: byte for i, byte in enumerate(LONG_TEXT.encode())}


class FakeTokenizer:
    vocab_size = VOCAB_SIZE
    stop_ids = frozenset({STOP_ID})

    def encode(self, text: str, at_most: int | None = None) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(BYTE_OF_ID.get(token_id, ord("?")) for token_id in token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([BYTE_OF_ID.get(token_id, ord("?"))])

    def encode_chat(self, messages: Sequence[Mapping[str, str]], at_most: int | None = None) -> list[int]:
        return self.encode(self.render_chat(messages))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Every content, and every role's first letter before it."""
        return "".join(f"<{message['role'][:1]}>{message['content']}" for message in messages)

    def stream(self) -> "FakeTextStream":
        return FakeTextStream(self)


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


@dataclass
class FakeState:
    token_B: np.ndarray  # last token; -1 = empty slot
    donated: bool = False

    def donate(self) -> np.ndarray:
        assert not self.donated, "this state was donated"
        self.donated = True
        return self.token_B.copy()


@dataclass
class FakeResult:
    """A token's log-probability is minus an eighth of its id; the likeliest are itself and those that follow it, each
    one less likely by 1."""

    token_BW: FakeArray
    count_B: FakeArray
    logprob_BW: FakeArray
    top_token_BWP: FakeArray
    top_logprob_BWP: FakeArray


@dataclass
class FakePrefix:
    token: int
    prompt_logprob_T: FakeArray


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
    step_s: float = 0.0
    tokens_per_step: int = 1
    """The most that a step brings a slot, as speculation would."""
    count_of_step: Callable[[int], int] | None = None
    """How many of them a step brings, by its number; None: all."""
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
    states_made: int = 0
    devices: tuple[FakeDevice, ...] = (FakeDevice(),)

    def get_tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def init_decode_state(self) -> FakeState:
        self.states_made += 1
        return FakeState(np.full(self.max_concurrent_decodes, -1))

    def warm_up(self, params: Any, decode_state: FakeState) -> FakeState:
        self.log.append("warm_up")
        return FakeState(decode_state.donate())

    def pad(self, token_ids: Sequence[int]) -> tuple[np.ndarray, int]:
        padded = np.zeros(self.max_prefill_length, np.int32)
        padded[: len(token_ids)] = token_ids
        return padded, len(token_ids)

    def prefill(
        self,
        params: Any,
        padded_tokens: np.ndarray,
        true_length: int,
        *,
        sampling: Any = None,
        prompt_logprobs: bool = False,
    ) -> tuple[FakePrefix, FakeResult]:
        prompt = padded_tokens[:true_length].tolist()
        self._call(f"prefill {FakeTokenizer().decode(prompt)}")
        self.samplings.append(sampling)
        self.on_prefill(prompt)
        logprob_T = -padded_tokens.astype(np.float32) / 8 if prompt_logprobs else np.zeros(len(padded_tokens))
        return FakePrefix(prompt[-1] + 1, self._array(logprob_T)), self._result(np.array([[prompt[-1] + 1]]))

    def resample(self, prefix: FakePrefix, sampling: Any) -> tuple[FakePrefix, FakeResult]:
        """The first token is ten later than that of the prefix."""
        self._call("resample")
        self.samplings.append(sampling)
        return FakePrefix(prefix.token + 10, prefix.prompt_logprob_T), self._result(np.array([[prefix.token + 10]]))

    def insert(self, prefix: FakePrefix, decode_state: FakeState, slot: int) -> FakeState:
        token_B = decode_state.donate()
        assert token_B[slot] == -1, f"{slot=} is taken"
        self._call(f"insert {slot}")
        token_B[slot] = prefix.token
        return FakeState(token_B)

    def generate(self, params: Any, decode_state: FakeState) -> tuple[FakeState, FakeResult]:
        step, self.steps = self.steps, self.steps + 1
        token_B = decode_state.donate()
        self._call("generate")
        self.on_generate(step)
        count = self.tokens_per_step if self.count_of_step is None else self.count_of_step(step)
        live_B1, after_W = token_B[:, None] >= 0, np.arange(1, self.tokens_per_step + 1)
        token_BW = np.where(live_B1 & (after_W <= count), (token_B[:, None] + after_W) % VOCAB_SIZE, -1)
        token_B = np.where(token_B >= 0, (token_B + count) % VOCAB_SIZE, -1)
        return FakeState(token_B), self._result(token_BW, lambda: self._wait(step))

    def _result(self, token_BW: np.ndarray, wait: Callable[[], None] = lambda: None) -> FakeResult:
        logprob_BW, top = -token_BW / np.float32(8), np.arange(MAX_LOGPROBS)
        return FakeResult(
            self._array(token_BW.astype(np.int32), wait),
            self._array((token_BW >= 0).sum(axis=1).astype(np.int32)),
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

    def free(self, decode_state: FakeState, slot: int) -> FakeState:
        token_B = decode_state.donate()
        assert token_B[slot] != -1, f"{slot=} is free already"
        self._call(f"free {slot}")
        token_B[slot] = -1
        return FakeState(token_B)
