"""Our engine as JetStream's: a subclass of google-jetstream 0.2.2's `Engine`, for its orchestrator and its configs.

    engine_create_fn = functools.partial(create_engine, config=EngineConfig(...))    # in a config_lib.ServerConfig

In 0.2.2 a prefill returns a prefix only and every token comes out of `generate`, so each call hands out the tokens
sampled before it and then computes the next: the first token comes from the first call after the insert, without
waiting for the step. A slot's answer ends with the first token that is marked invalid.

JetStream never frees a slot. One whose answer ended with a stop token is emptied here, and so is one that `idle_slots`
names, where the host has set it. Without it a slot that reached max_tokens, which the engine is not told, decodes on
unheard until it is inserted into anew or its cache is full.
"""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..config import EngineConfig
from ..engine import Engine
from ..errors import RefusedError
from ..forward import Params
from ..loading import load_engine
from ..state import DecodeState, Prefix
from ..text.tokenizer import Tokenizer
from . import compat as jetstream_compat

with jetstream_compat.importing():
    from jetstream.core import orchestrator
    from jetstream.engine import engine_api, token_utils, tokenizer_api
    from jetstream.engine.tokenizer_pb2 import TokenizerParameters  # pyright: ignore[reportAttributeAccessIssue]

log = logging.getLogger(__name__)

jetstream_compat.delete_prefixes(orchestrator)  # here, so that every Driver that gets this engine is mended
jetstream_compat.join_bytes(token_utils)
jetstream_compat.pad_lists(token_utils)

LONGEST_PREFILL = 32768
"""The last of the lengths that JetStream pads a prompt to (tokens)."""

NO_BOS = -1
"""The BOS of a model that takes none, as in SentencePiece. JetStream puts a BOS before every prompt, token lists too;
this one is no token, so that it can be told from the prompt and taken away."""

NO_TOKEN = -2
"""An id that no vocabulary has."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JetStreamState:
    """All slots between two calls of generate."""

    decode: DecodeState
    next_BW: jax.Array
    """i32, what the next call hands out; -1 = none. W is 1: JetStream takes one token of a slot at a time"""
    handed_B: jax.Array
    """i32, tokens of the answer handed out so far"""


class JetStreamEngine(engine_api.Engine):
    """Every method of JetStream's abstract engine over ours. Its threads may call it at the same time."""

    def __init__(self, engine: Engine, params: Params) -> None:
        self._engine, self._params = engine, params
        self.idle_slots: Callable[[], Collection[int]] = tuple
        """Asked before every step: slots that nobody waits for."""
        self._tokenizer = JetStreamTokenizer(engine.get_tokenizer())
        # Two threads that start programs on the same devices in turn could start them in another order on each device,
        # and their collectives would wait for one another. Also, tracing a torch module is for one thread at a time.
        self._turn = threading.Lock()
        self._everywhere = NamedSharding(engine.mesh, PartitionSpec())
        stop_ids = np.array(sorted(engine.get_tokenizer().stop_ids), np.int32)

        def hand_out(next_BW, handed_B, length_B, idle_B):
            next_B = jnp.squeeze(next_BW, axis=1)
            valid_B = next_B >= 0
            handed_B = handed_B + valid_B
            ended_B = idle_B | jnp.isin(next_B, stop_ids)
            data_B3 = jnp.stack([next_B, valid_B.astype(jnp.int32), handed_B], axis=1)
            return data_B3, handed_B, jnp.where(ended_B, 0, length_B)

        def take_up(next_BW, handed_B, token, slot):
            return next_BW.at[slot].set(token), handed_B.at[slot].set(0)

        self._hand_out = jax.jit(hand_out, out_shardings=self._everywhere)
        self._take_up = jax.jit(take_up, out_shardings=self._everywhere)

    def warm_up(self) -> None:
        """Compile every program. Without it a program compiles when its first request comes."""
        state = self._engine.warm_up(self._params, self._engine.init_decode_state())
        state = self.insert(self._refused(self._params), self._wrapped(state), 0)
        self.generate(self._params, state)[1].convert_to_numpy()

    def load_params(self, *args: Any, **kwargs: Any) -> Params:
        """The parameters that the engine was built with."""
        return self._params

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: Prefix | None = None,
        padded_tokens: jax.Array | np.ndarray,
        true_length: int,
    ) -> Prefix:
        """Compute a prompt's keys and values and choose its first token.

        A prompt that cannot be answered (empty, or with ids outside the vocabulary) gives a prefix whose answer ends
        before its first token: an exception here would take JetStream's thread, and the server, down.

        Raises RefusedError for an existing prefix.
        """
        if existing_prefix is not None:
            raise RefusedError("existing_prefix must be None: prefixes are not extended here; give the whole prompt")
        prompt_ids = self._prompt(np.asarray(padded_tokens), true_length)
        try:
            self._check(prompt_ids)
        except RefusedError as error:
            log.warning("a request gets an empty answer: %s", error)
            return self._refused(params)
        with self._turn:
            return self._engine.prefill(params, *self._engine.pad(prompt_ids))[0]

    def insert(self, prefix: Prefix, decode_state: JetStreamState, slot: int) -> JetStreamState:
        """Put a prefix into a slot, whatever was there; the state is donated, the prefix is not."""
        with self._turn:
            decode = self._engine.insert(prefix, decode_state.decode, slot)
            taken_up = self._take_up(decode_state.next_BW, decode_state.handed_B, prefix.token, np.int32(slot))
        return JetStreamState(decode, *taken_up)

    def generate(self, params: Params, decode_state: JetStreamState) -> tuple[JetStreamState, engine_api.ResultTokens]:
        """Hand out one token of every slot and compute the next. The state is donated.

        The result's data is i32 [B, 3]: the token, whether it is one, and how many its answer has with it.
        """
        # JetStream starts up to eight steps before it reads the first one's tokens: prompts and finished slots would
        # wait behind them. Here the step before the last has to be done; the last one may still run.
        decode_state.handed_B.block_until_ready()
        decode = decode_state.decode
        idle_B = np.zeros(self.max_concurrent_decodes, bool)
        idle_B[list(self.idle_slots())] = True
        with self._turn:
            data_B3, handed_B, length_B = self._hand_out(
                decode_state.next_BW, decode_state.handed_B, decode.length_B, idle_B
            )
            decode, result = self._engine.generate(params, replace(decode, length_B=length_B))
        tokens = engine_api.ResultTokens(
            data=data_B3, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )
        return JetStreamState(decode, result.token_BW, handed_B), tokens

    def init_decode_state(self, *args: Any, **kwargs: Any) -> JetStreamState:
        """All slots empty."""
        return self._wrapped(self._engine.init_decode_state())

    def get_prefix_destination_sharding(self) -> Any:
        """The shardings that a prefix of another engine takes on this one: a tree like a Prefix."""
        return self._engine.programs.prefix_sharding()

    def get_tokenizer(self) -> TokenizerParameters:
        """Names the model; what JetStream asks of a tokenizer is `build_tokenizer`'s."""
        return TokenizerParameters(path=self._engine.model_name, extra_ids=0)

    def build_tokenizer(self, metadata: TokenizerParameters) -> "JetStreamTokenizer":
        """The model's own, which came with its weights."""
        return self._tokenizer

    @property
    def max_concurrent_decodes(self) -> int:
        """Slots."""
        return self._engine.max_concurrent_decodes

    @property
    def samples_per_slot(self) -> int:
        """One."""
        return 1

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt (tokens): a power of two from 16 to 32768, of which JetStream keeps a list."""
        return min(self._engine.max_prefill_length, LONGEST_PREFILL)

    @property
    def mesh(self) -> Mesh:
        """The engine's devices."""
        return self._engine.mesh

    @property
    def colocated_cpus(self) -> list[Any] | None:
        """This host's CPU devices; None when JAX was started without."""
        try:
            return jax.local_devices(backend="cpu")
        except RuntimeError:
            return None

    def _wrapped(self, decode: DecodeState) -> JetStreamState:
        slots = self.max_concurrent_decodes
        none_BW = jax.device_put(np.full((slots, 1), -1, np.int32), self._everywhere)
        return JetStreamState(decode, none_BW, jax.device_put(np.zeros(slots, np.int32), self._everywhere))

    def _prompt(self, padded_T: np.ndarray, true_length: int) -> list[int]:
        """The prompt as the model's tokenizer begins one. JetStream has cut one that is too long at its beginning, and
        then tells a `true_length` beyond the padded one's."""
        prompt_ids = padded_T[:true_length].astype(np.int32).tolist()
        bos = self._tokenizer.bos_id
        is_doubled = bos != NO_BOS and prompt_ids[:2] == [bos, bos]
        return prompt_ids[1:] if is_doubled or prompt_ids[:1] == [NO_BOS] else prompt_ids

    def _check(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise RefusedError("the prompt is empty")
        for token_id in prompt_ids:
            if not 0 <= token_id < self._engine.vocab_size:
                raise RefusedError(f"{token_id=} is outside the vocabulary; ids go to {self._engine.vocab_size - 1}")

    def _refused(self, params: Params) -> Prefix:
        """A prefix that leaves its slot empty."""
        with self._turn:
            prefix, _ = self._engine.prefill(params, *self._engine.pad([0]))
        length, token = jax.device_put((np.int32(0), np.int32(-1)), self._everywhere)
        return replace(prefix, length=length, token=token)


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """The model's tokenizer, as JetStream's Driver uses one: prompts padded, answers decoded a token at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        try:
            # Some decoders drop the space that a text begins with, so every token is decoded behind this one.
            self._before_ids = tokenizer.encode("a")[-1:]
        except RefusedError:  # a model without a tokenizer: token ids only
            self._before_ids = []
        self._before = tokenizer.decode(self._before_ids)

    def encode(self, s: str, **kwargs: Any) -> tuple[jax.Array | np.ndarray, int]:
        """(token ids behind `bos_id`, padded to the next of JetStream's lengths; their number without the padding).

        Takes JetStream's options: is_bos, prefill_lengths, max_prefill_length, jax_padding. For a model without a
        tokenizer the ids are none that could be answered, see `JetStreamEngine.prefill`.
        """
        token_ids = self._tokenizer.encode(s) if self._before_ids else [NO_TOKEN]
        if self.bos_id != NO_BOS:
            token_ids = token_ids[1:]  # JetStream puts it back
        return token_utils.pad_tokens(np.array(token_ids, np.int32), self.bos_id, self.pad_id, **kwargs)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """The text of an answer's tokens. A single token that is part of a character is its bytes, `<0xF0><0x9F>`,
        which the orchestrator joins with what follows."""
        text = self._tokenizer.decode([*self._before_ids, *token_ids]).removeprefix(self._before)
        if len(token_ids) == 1 and "\ufffd" in text:
            return "".join(f"<0x{byte:02X}>" for byte in self._tokenizer.token_bytes(token_ids[0]))
        return text

    @property
    def stop_tokens(self) -> set[int]:
        """Tokens that end an answer."""
        return set(self._tokenizer.stop_ids)

    @property
    def bos_id(self) -> int:
        """What JetStream puts before every prompt: the model's BOS, or NO_BOS where its tokenizer adds none."""
        return next(iter(self._tokenizer.first_ids), NO_BOS)

    @property
    def eos_id(self) -> int:
        """One of the tokens that end an answer; NO_TOKEN where none does."""
        eos_id = self._tokenizer.eos_id
        return NO_TOKEN if eos_id is None else eos_id

    @property
    def pad_id(self) -> int:
        """What fills a bucket; no attention sees it."""
        return 0


def create_engine(devices: Sequence[Any], config: EngineConfig) -> JetStreamEngine:
    """Load and compile the engine that `config` describes, on these devices. Raises RefusedError, see `load_engine`."""
    engine = JetStreamEngine(*load_engine(config, devices))
    engine.warm_up()
    return engine
