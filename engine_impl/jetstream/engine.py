"""Our engine as JetStream's: a subclass of google-jetstream 0.2.2's `Engine`, for its orchestrator and its configs.

    engine_create_fn = functools.partial(create_engine, config=EngineConfig(...))    # in a config_lib.ServerConfig

In 0.2.2 a prefill returns a prefix only and every token comes out of `generate`, so each call hands out the tokens
sampled before it and then computes the next: the first token comes from the first call after the insert, without
waiting for the step. A slot's answer ends with the first token that is marked invalid.

JetStream never frees a slot. One whose answer ended with a stop token is emptied here, and so is one that `idle_slots`
names, where the host has set it. Without it a slot that reached max_tokens, which the engine is not told, decodes on
unheard until it is inserted into anew or its cache is full.

Nor can it take a slot's request away again, so every slot has the pages of its longest request for itself. A prompt is
computed in one piece, on JetStream's thread for prefills and perhaps on other devices than the slots'. An existing
prefix's rows are put into a cache of the adapter's own for it, which holds one request.
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

from ...cache_manager import KV
from ..api import Opening, Piece
from ..config import EngineConfig
from ..engine import Engine
from ..errors import RefusedError
from ..forward import Params
from ..loading import load_engine
from ..programs import GREEDY
from ..sampling.logprobs import nothing
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
class JetStreamPrefix:
    """A prompt after prefill."""

    text: Prefix
    """of one piece, which is the whole prompt"""
    token_T: jax.Array
    """i32, its tokens, padded: a prefix that goes on computes those behind its last whole page again"""


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
        """Raises RefusedError for a cache that is too small for all slots' longest requests."""
        self._engine, self._params = engine, params
        slots, pages = engine.max_concurrent_decodes, engine.pages_per_slot
        if engine.pages < slots * pages:
            rows = engine.page_rows
            raise RefusedError(
                f"cache_tokens={engine.pages * rows} must be at least {slots * pages * rows} under JetStream, where "
                f"each of {slots} slots has {pages * rows} tokens for itself; use fewer --slots or a shorter "
                "--cache-length"
            )
        self._page_BJ = np.arange(slots * pages, dtype=np.int32).reshape(slots, pages)
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

        def take_up(next_BW, handed_B, token_N, slot):
            return next_BW.at[slot].set(token_N), handed_B.at[slot].set(0)

        self._hand_out = jax.jit(hand_out, out_shardings=self._everywhere)
        self._take_up = jax.jit(take_up, out_shardings=self._everywhere)

        at = engine.programs.cache_sharding()
        page_1J, start_1 = self._page_BJ[:1], np.zeros(1, np.int32)
        self._scratch: KV = jax.jit(replace(engine.layout, pages=pages).empty, out_shardings=at)()
        """One request's pages."""

        def store(cache: KV, kv: KV, count_1: jax.Array) -> KV:
            return engine.programs.store_texts(cache, kv, jnp.asarray(page_1J), jnp.asarray(start_1), count_1)

        self._store = jax.jit(store, donate_argnums=0, out_shardings=at)
        self._join = jax.jit(_joined, static_argnums=3, out_shardings=engine.programs.prefix_sharding().kv)

    def warm_up(self) -> None:
        """Compile every program, but for those of existing prefixes. Without it a program compiles when its first
        request comes."""
        state = self.init_decode_state()
        for pieces, tokens in self._engine.shapes.prefills:
            if pieces == 1:
                with self._turn:
                    prefix = self._prefilled(self._params, [0] * tokens, 0)
                state = self.insert(prefix, state, 0)
        state = self.insert(self._refused(self._params), state, 0)
        self.generate(self._params, state)[1].convert_to_numpy()

    def load_params(self, *args: Any, **kwargs: Any) -> Params:
        """The parameters that the engine was built with."""
        return self._params

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: JetStreamPrefix | None = None,
        padded_tokens: jax.Array | np.ndarray,
        true_length: int,
    ) -> JetStreamPrefix:
        """Compute a prompt's keys and values and choose its first token. The tokens go on behind those of an existing
        prefix, which stays as it is; its whole pages are not computed again.

        A prompt that cannot be answered (empty, too long, or with ids outside the vocabulary) gives a prefix whose
        answer ends before its first token: an exception here would take JetStream's thread, and the server, down.
        """
        prompt_ids = self._prompt(np.asarray(padded_tokens), true_length)
        shared = 0
        if existing_prefix is not None:
            (length,) = np.asarray(existing_prefix.text.count_N)
            prompt_ids = np.asarray(existing_prefix.token_T)[:length].tolist() + prompt_ids
            shared = min(int(length), len(prompt_ids) - 1) // self._engine.page_rows * self._engine.page_rows
        try:
            self._check(prompt_ids)
        except RefusedError as error:
            log.warning("a request gets an empty answer: %s", error)
            return self._refused(params)
        with self._turn:
            if not shared or existing_prefix is None:
                return self._prefilled(params, prompt_ids, 0)
            return self._behind(params, existing_prefix.text.kv, prompt_ids, shared)

    def insert(self, prefix: JetStreamPrefix, decode_state: JetStreamState, slot: int) -> JetStreamState:
        """Put a prefix into a slot, whatever was there; the state is donated, the prefix is not."""
        with self._turn:
            decode = self._engine.insert(prefix.text, decode_state.decode, [slot], self._page_BJ[slot : slot + 1])
            token_N = prefix.text.token_N
            taken_up = self._take_up(decode_state.next_BW, decode_state.handed_B, token_N, np.int32(slot))
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
            slot_N = np.arange(self.max_concurrent_decodes, dtype=np.int32)
            decode, result = self._engine.generate(params, replace(decode, length_B=length_B), slot_N, self._page_BJ)
        tokens = engine_api.ResultTokens(
            data=data_B3, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )
        return JetStreamState(decode, result.token_BW, handed_B), tokens

    def init_decode_state(self, *args: Any, **kwargs: Any) -> JetStreamState:
        """All slots empty."""
        return self._wrapped(self._engine.init_decode_state())

    def get_prefix_destination_sharding(self) -> Any:
        """The shardings that a prefix of another engine takes on this one: a tree like a JetStreamPrefix."""
        everywhere: Any = self._everywhere
        return JetStreamPrefix(self._engine.programs.prefix_sharding(), everywhere)

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
        """Longest prompt (tokens): a power of two up to 32768, of which JetStream keeps a list."""
        longest = min(self._engine.max_prefill_length, self._engine.prefill_chunk, LONGEST_PREFILL)
        return 1 << (longest.bit_length() - 1)

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
        longest = min(self._engine.max_prefill_length, self._engine.prefill_chunk)
        if not 0 < len(prompt_ids) <= longest:
            raise RefusedError(f"a prompt of {len(prompt_ids)} tokens must have from 1 to {longest}")
        for token_id in prompt_ids:
            if not 0 <= token_id < self._engine.vocab_size:
                raise RefusedError(f"{token_id=} is outside the vocabulary; ids go to {self._engine.vocab_size - 1}")

    def _prefilled(self, params: Params, prompt_ids: Sequence[int], shared: int) -> JetStreamPrefix:
        """A prompt, or what stands behind its first `shared` tokens, which are in the cache of the adapter's own."""
        token_T = np.array(prompt_ids[shared:], np.int32)
        piece = Piece(token_T=token_T, start=shared, page_J=self._page_BJ[0])
        prefix = self._engine.prefill_behind(params, self._scratch, [piece])
        opening = Opening(text=prompt_ids, prompt_length=len(prompt_ids), sampling=GREEDY)
        prefix, _ = self._engine.first_tokens(prefix, [opening])
        return JetStreamPrefix(prefix, self._tokens(prompt_ids))

    def _behind(self, params: Params, before: KV, prompt_ids: Sequence[int], shared: int) -> JetStreamPrefix:
        """A prompt whose first `shared` tokens, whole pages, are those of `before`."""
        self._scratch = self._store(self._scratch, before, np.array([shared], np.int32))
        made = self._prefilled(params, prompt_ids, shared)
        _, tokens = self._engine.shapes.prefill_of([len(prompt_ids)])
        kv = self._join(before, made.text.kv, np.int32(shared), tokens)
        whole = jax.device_put((np.zeros(1, np.int32), np.array([len(prompt_ids)], np.int32)), self._everywhere)
        told = nothing(tokens)
        of_tokens = jax.device_put([np.zeros((1, *values.shape), values.dtype) for values in told], self._everywhere)
        names = ("logprob_NT", "top_token_NTP", "top_logprob_NTP")
        text = replace(made.text, kv=kv, start_N=whole[0], count_N=whole[1], **dict(zip(names, of_tokens, strict=True)))
        return JetStreamPrefix(text, made.token_T)

    def _tokens(self, prompt_ids: Sequence[int]) -> jax.Array:
        """Padded as its rows are."""
        _, tokens = self._engine.shapes.prefill_of([len(prompt_ids)])
        return jax.device_put(np.pad(np.array(prompt_ids, np.int32), (0, tokens - len(prompt_ids))), self._everywhere)

    def _refused(self, params: Params) -> JetStreamPrefix:
        """A prefix that leaves its slot empty."""
        with self._turn:
            prefix = self._prefilled(params, [0], 0)
        count_N, token_N = jax.device_put((np.zeros(1, np.int32), np.full(1, -1, np.int32)), self._everywhere)
        return replace(prefix, text=replace(prefix.text, count_N=count_N, token_N=token_N))


def _joined(before: KV, behind: KV, shared: jax.Array, tokens: int) -> KV:
    """The first `shared` rows of a text and those behind them as the rows of one piece, padded to `tokens`."""

    def join(before: jax.Array, behind: jax.Array, axis: int) -> jax.Array:
        room = tokens + behind.shape[axis]  # so that the padding of what comes behind has room too
        both = jax.lax.slice_in_dim(before, 0, min(room, before.shape[axis]), axis=axis)
        padding = [(0, room - both.shape[axis] if i == axis else 0) for i in range(both.ndim)]
        both = jax.lax.dynamic_update_slice_in_dim(jnp.pad(both, padding), behind, shared, axis)
        return jax.lax.slice_in_dim(both, 0, tokens, axis=axis)

    rows = join(before.rows, behind.rows, 2)
    if before.scales is None or behind.scales is None:
        return KV(rows)
    return KV(rows, join(before.scales, behind.scales, 3))


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
        """What JetStream fills a prompt's padded length with; no attention sees it."""
        return 0


def create_engine(devices: Sequence[Any], config: EngineConfig) -> JetStreamEngine:
    """Load and compile the engine that `config` describes, on these devices, with fewer slots than its default where
    the cache holds no more.

    Raises RefusedError as `load_engine` does, and for a `prefill_chunk`.
    """
    if config.prefill_chunk is not None:
        raise RefusedError("under JetStream a prompt is computed in one piece; leave --prefill-chunk out")
    config = replace(config, prefill_chunk=LONGEST_PREFILL)
    engine = JetStreamEngine(*load_engine(config, devices, reserves=True))
    engine.warm_up()
    return engine
