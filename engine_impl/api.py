"""The engine's face: what the server, the benchmarks and JetStream's adapter know of an engine. Protocols and values.

    prefix, result = engine.prefill(params, *engine.pad(prompt_ids), sampling=...)
    state = engine.insert(prefix, state, slot)
    state, result = engine.generate(params, state)
    state = engine.free(state, slot)

State goes in and comes out; `insert`, `generate` and `free` donate it. Parameters, prefixes and states are handles:
whoever holds them hands them back unopened. Nothing heavy is imported here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from .sampling.params import SamplingParams

ParamsT = TypeVar("ParamsT", contravariant=True)
"""The weights on the devices."""
PrefixT = TypeVar("PrefixT", bound="Prefix")
"""A prompt after prefill."""
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
    """What a step tells the host: up to W tokens per slot; W is 1. A prefill's result has one slot."""

    @property
    def token_BW(self) -> DeviceArray:
        """i32, the step's tokens in order; -1 from `count` on"""
        ...

    @property
    def count_B(self) -> DeviceArray:
        """i32, how many of the slot's tokens are valid; 0 for a slot that is empty or full"""
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
    """A prompt after prefill, ready for any slot."""

    @property
    def prompt_logprob_T(self) -> DeviceArray:
        """f32, log p(token t | tokens before it); 0 at the first token, at padding, and where nobody asked"""
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
    stop_ids: frozenset[int]
    """Tokens that end an answer."""

    def encode(self, text: str, at_most: int | None = None) -> list[int]:
        """Token ids of raw text, a BOS first where the model wants one. May raise TooLongError for more than `at_most`
        before all of it is read."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]], at_most: int | None = None) -> list[int]:
        """Token ids of a conversation in the model's chat form. Raises likewise."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for: perhaps part of a character."""
        ...

    def stream(self) -> TextStream:
        """For one answer."""
        ...


class Device(Protocol):
    """One of JAX's devices."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name; None where the platform does not tell."""
        ...


class Engine(Protocol[ParamsT, PrefixT, StateT]):
    """A model on its devices, serving `max_concurrent_decodes` requests together."""

    model_name: str

    @property
    def max_concurrent_decodes(self) -> int:
        """Slots."""
        ...

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt (tokens)."""
        ...

    @property
    def cache_length(self) -> int:
        """Prompt and answer of one request together (tokens)."""
        ...

    @property
    def devices(self) -> Iterable[Device]:
        """What it runs on."""
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

    def pad(self, token_ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """A prompt as `prefill` takes it: (padded_T i32, true length). Raises RefusedError for one that is too long."""
        ...

    def prefill(
        self,
        params: ParamsT,
        padded_tokens: np.ndarray,
        true_length: int,
        *,
        sampling: SamplingParams = ...,
        prompt_logprobs: bool = False,
    ) -> tuple[PrefixT, StepResult]:
        """A prompt's keys and values, and its first token."""
        ...

    def resample(self, prefix: PrefixT, sampling: SamplingParams) -> tuple[PrefixT, StepResult]:
        """Another first token for the same prompt."""
        ...

    def insert(self, prefix: PrefixT, decode_state: StateT, slot: int) -> StateT:
        """Puts a prefix into a slot, whatever was there. The state is donated, the prefix is not."""
        ...

    def generate(self, params: ParamsT, decode_state: StateT) -> tuple[StateT, StepResult]:
        """One decode step of every slot that is neither empty nor full. The state is donated."""
        ...

    def free(self, decode_state: StateT, slot: int) -> StateT:
        """Empties a slot. The state is donated."""
        ...


AnyEngine = Engine[Any, Any, Any]
"""For those who hold no parameters and no state."""
