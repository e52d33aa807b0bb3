"""Our engine as that of JetStream's last source, which no release has.

A prefill tells the first token at once, and `generate` the tokens of its own step. A prompt may have several answers:
`prefill_multisampling` chooses their first tokens, `bulk_insert` puts each into a slot of its own. JetStream names the
slots whose requests are over (`free_resource`); one whose answer ended with a stop token is emptied before that.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..engine import Engine
from ..errors import RefusedError
from ..forward import Params
from ..sampling.params import SamplingParams
from ..state import DecodeState, Prefix
from .adapter import Adapter
from .prompts import JetStreamPrefix

GREEDY = SamplingParams(logprobs=0)
"""With each token's log-probability, which a ResultTokens has room for."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LastState:
    """All slots between two steps."""

    decode: DecodeState
    handed_B: jax.Array
    """i32, tokens of the answer handed out so far, the prefill's included"""


class LastSourceAdapter(Adapter):
    """Every method of its abstract engine."""

    def __init__(self, engine: Engine, params: Params) -> None:
        """Raises RefusedError for a cache that is too small for all slots' longest requests."""
        super().__init__(engine, params)
        self._requests = threading.Lock()
        self._requests_B = np.zeros(self.max_concurrent_decodes, np.int32)
        """Requests that were put into each slot and have not been told to be over."""
        stop_ids, cache_length = self._stop_ids, engine.sizes.cache_length

        def before_step(token_B, length_B, handed_B, idle_B):
            length_B = jnp.where(idle_B | jnp.isin(token_B, stop_ids), 0, length_B)
            return length_B, handed_B + ((length_B > 0) & (length_B < cache_length))

        def data(token_M, length_M):
            return jnp.stack([token_M, (token_M >= 0).astype(jnp.int32), length_M], axis=1)

        self._before_step = jax.jit(before_step, out_shardings=self._everywhere)
        self._data = jax.jit(data, out_shardings=self._everywhere)
        self._take_up = jax.jit(lambda handed_B, slot: handed_B.at[slot].set(1), out_shardings=self._everywhere)
        self._answer = jax.jit(
            lambda of_M, answer: jax.lax.dynamic_slice_in_dim(of_M, answer, 1), out_shardings=self._everywhere
        )

    def warm_up(self) -> None:
        """Compile every program, but for those of existing prefixes and of several answers."""
        super().warm_up()
        _, first = self.prefill(params=self._params, padded_tokens=np.zeros(1, np.int32), true_length=1)
        first.convert_to_numpy()

    def init_decode_state(self, *args: Any, **kwargs: Any) -> LastState:
        """All slots empty."""
        with self._requests:
            self._requests_B[:] = 0
        return LastState(self._engine.init_decode_state(), self._none_B())

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: Any = None,
        padded_tokens: Any,
        true_length: int,
        sampler: Any = None,
        request_id: Any = None,
    ) -> tuple[JetStreamPrefix, Any]:
        """Compute a prompt's keys and values and choose its first token, see `prefix_of`; `existing_prefix` is an
        ExistingPrefix of JetStream's. `request_id` is for engines whose pages have names.

        Raises RefusedError for a sampler.
        """
        return self.prefill_multisampling(
            params=params,
            existing_prefix=existing_prefix,
            padded_tokens=padded_tokens,
            true_length=true_length,
            sampler=sampler,
        )

    def prefill_multisampling(
        self,
        *,
        params: Params,
        existing_prefix: Any = None,
        padded_tokens: Any,
        true_length: int,
        sampler: Any = None,
        rng: jax.Array | None = None,
        num_samples: int = 1,
        request_id: Any = None,
    ) -> tuple[JetStreamPrefix, Any]:
        """`prefill` for several answers. With a key `rng` they are drawn at temperature 1, each by a seed of its own;
        without it all are greedy, which makes them equal.

        The result's data is i32 [num_samples, 3], as `generate`'s.

        Raises RefusedError for more answers than slots and for a sampler.
        """
        check_no_sampler(sampler)
        if not 1 <= num_samples <= self.max_concurrent_decodes:
            raise RefusedError(
                f"{num_samples=} must be from 1 to {self.max_concurrent_decodes}, the slots that there are"
            )
        samplings = [GREEDY] * num_samples if rng is None else drawn(rng, num_samples)
        prefix, results = self.prefix_of(params, padded_tokens, true_length, existing_prefix, samplings)
        with self._turn:
            data_M3 = self._data(prefix.token_M, np.ones(num_samples, np.int32))
            log_prob_M1 = np.zeros((num_samples, 1), np.float32)
            if results:
                log_prob_M1 = jnp.concatenate([result.logprob_BW for result in results])
        return prefix, self._told(data_M3, log_prob_M1, num_samples)

    def insert(self, prefix: JetStreamPrefix, decode_state: LastState, slot: int, request_id: Any = None) -> LastState:
        """Put a prefix, with the first of its answers, into a slot, whatever was there; the state is donated, the
        prefix is not."""
        return self._taken_up(prefix, 0, decode_state, slot)

    def bulk_insert(self, prefix: JetStreamPrefix, decode_state: LastState, slots: Sequence[int]) -> LastState:
        """Put each of a prefix's answers into one of the slots; the state is donated, the prefix is not.

        Raises RefusedError for more or fewer slots than answers.
        """
        answers = len(prefix.token_M)
        if len(slots) != answers:
            raise RefusedError(f"{len(slots)} slots for a prefix of {answers} answers; each answer needs one")
        for answer, slot in enumerate(slots):
            decode_state = self._taken_up(prefix, answer, decode_state, slot)
        return decode_state

    def generate(self, params: Params, decode_state: LastState, sampler: Any = None) -> tuple[LastState, Any]:
        """One token of every slot. The state is donated.

        The result's data is i32 [B, 3]: the token, whether it is one, and how many its answer has with it; its log_prob
        f32 [B, 1].

        Raises RefusedError for a sampler.
        """
        check_no_sampler(sampler)
        # JetStream starts several steps before it reads the first one's tokens: prompts and finished slots would wait
        # behind them. Here the step before the last has to be done; the last one may still run.
        decode_state.handed_B.block_until_ready()
        decode = decode_state.decode
        with self._requests:
            idle_B = self._requests_B == 0
        with self._turn:
            length_B, handed_B = self._before_step(decode.token_B, decode.length_B, decode_state.handed_B, idle_B)
            decode, result = self._generated(params, replace(decode, length_B=length_B))
            data_B3 = self._data(result.token_BW[:, 0], handed_B)
        return LastState(decode, handed_B), self._told(data_B3, result.logprob_BW, 1)

    def free_resource(self, slot: int) -> None:
        """The slot's request is over: unless another one is there already, the slot takes no part in the next step.

        JetStream tells this after it has offered the slot again, from another thread, so it may come behind the next
        request's insert.
        """
        with self._requests:
            self._requests_B[slot] = max(0, self._requests_B[slot] - 1)

    @property
    def use_chunked_prefill(self) -> bool:
        """A prompt is computed in one piece."""
        return False

    @property
    def prefill_chunk_size(self) -> int:
        """Most tokens of that piece."""
        return self.max_prefill_length

    def _taken_up(self, prefix: JetStreamPrefix, answer: int, decode_state: LastState, slot: int) -> LastState:
        with self._requests:
            self._requests_B[slot] += 1
        with self._turn:
            decode = self._inserted(self._text_of(prefix, answer), decode_state.decode, slot)
            handed_B = self._take_up(decode_state.handed_B, np.int32(slot))
        return LastState(decode, handed_B)

    def _text_of(self, prefix: JetStreamPrefix, answer: int) -> Prefix:
        token_N, seed_N = (self._answer(of_M, np.int32(answer)) for of_M in (prefix.token_M, prefix.seed_M))
        return replace(prefix.text, token_N=token_N, sampling=replace(prefix.text.sampling, seed=seed_N))

    def _told(self, data_M3: jax.Array, log_prob_M1: Any, samples: int) -> Any:
        return self.api.ResultTokens(
            data=data_M3,
            tokens_idx=(0, 1),
            valid_idx=(1, 2),
            length_idx=(2, 3),
            samples_per_slot=samples,
            log_prob=log_prob_M1,
        )


def drawn(rng: jax.Array, count: int) -> list[SamplingParams]:
    """Samplings at temperature 1, each with a seed of the key's."""
    seeds = np.asarray(jax.random.bits(rng, (count,), np.uint32)).tolist()
    return [replace(GREEDY, temperature=1.0, seed=seed) for seed in seeds]


def check_no_sampler(sampler: Any) -> None:
    """Raises RefusedError for one: tokens are chosen within the step's program."""
    if sampler is not None:
        raise RefusedError("sampler: not with this engine, which chooses tokens within its own programs; leave it out")
