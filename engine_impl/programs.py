"""The device programs: plain functions from arrays to arrays, compiled by `Programs.jitted`.

A decode step reads the cache, keeps its new rows aside, chooses tokens, and stores the rows at its end. That is
`Programs.step`, of which `generate` and `score_step` are two uses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import cache_manager
from ..cache_manager import KV, CacheLayout
from ..kernels import Backend
from . import forward
from .attention import Attend, attend_cache, attend_prompt
from .forward import Params
from .models.decoder import Decoder
from .sampling.choose import sample
from .sampling.logprobs import logprob_of, logprobs
from .sampling.params import SamplingParams
from .sampling.penalties import count_answer, counts_of_prompt
from .sampling.slots import SlotSampling
from .state import DecodeState, Prefix, StepResult
from .weights.sharding import parameter_spec

GREEDY = SamplingParams()


class Chosen(NamedTuple):
    """What follows from a step's logits."""

    token_B: jax.Array
    """i32, each slot's next token; must depend on the logits, see `Programs.step`"""
    count_BV: jax.Array
    """u16, as in DecodeState"""
    told: Any
    """what the step hands to its caller"""


Choose = Callable[[jax.Array, DecodeState, jax.Array], Chosen]
"""(logits_BV, the state before the step, live_B bool) -> Chosen"""


@dataclass(frozen=True, eq=False)
class Programs:
    """One model on one mesh. The five methods behind "The cache" decide how rows are stored; a baseline overrides them.

    All programs but prefill, resample and force donate the state. Those that touch the cache take the page table, or a
    slot's row of it: whose pages are whose is the host's knowledge.
    """

    model: Decoder
    mesh: Mesh
    layout: CacheLayout
    backend: Backend

    @property
    def cache_length(self) -> int:
        """Tokens of a full slot: the cache's rows, at most the model's positions."""
        return min(self.layout.length, self.model.config.context_length)

    # A decode step

    def step(self, params: Params, state: DecodeState, page_BJ: jax.Array, choose: Choose) -> tuple[DecodeState, Any]:
        """One token for every live slot, a slot that is neither empty nor full: (state, what `choose` tells)."""
        live_B = (state.length_B > 0) & (state.length_B < self.cache_length)
        logits_BV, new = self.decode(params, state, page_BJ, live_B)
        chosen_B, count_BV, told = choose(logits_BV, state, live_B)
        token_B = jnp.where(live_B, chosen_B, state.token_B)
        # No token is negative, but XLA does not know: so the flush waits for the last layer's attention too. Nothing
        # else orders the two, and to keep that read safe XLA:CPU would copy the whole cache, every step.
        cache = self.store(state.cache, new, state.length_B, live_B & (token_B >= 0), page_BJ)
        return DecodeState(cache, token_B, state.length_B + live_B, state.sampling, count_BV), told

    def generate(self, params: Params, state: DecodeState, page_BJ: jax.Array) -> tuple[DecodeState, StepResult]:
        """The step that serves: each slot's token is chosen by its own sampling parameters."""

        def choose(logits_BV: jax.Array, state: DecodeState, live_B: jax.Array) -> Chosen:
            count_BV = count_answer(state.count_BV, state.token_B, state.sampling)
            # The text so far is `length` cached tokens and this step's own: the chosen token stands behind both.
            token_B = sample(logits_BV, count_BV, state.sampling, state.length_B + 1)
            return Chosen(token_B, count_BV, self._result(logits_BV, token_B, live_B, state.sampling))

        return self.step(params, state, page_BJ, choose)

    def score_step(
        self, params: Params, state: DecodeState, page_BJ: jax.Array, next_token_B: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        """The step with given tokens: (state, logprob_B f32, each given token's)."""

        def choose(logits_BV: jax.Array, state: DecodeState, live_B: jax.Array) -> Chosen:
            logprob_B = logprob_of(logits_BV, next_token_B)
            return Chosen(given(next_token_B, logprob_B), state.count_BV, logprob_B)

        return self.step(params, state, page_BJ, choose)

    # A prompt

    def prefill(
        self, params: Params, token_T: jax.Array, length: jax.Array, sampling: SlotSampling, wants_logprobs: jax.Array
    ) -> tuple[Prefix, StepResult]:
        """A padded prompt's keys, values and first token. `sampling` is scalars."""
        attend = attend_prompt(
            token_T.shape[0], head_dim=self.layout.head_dim, codec=self.layout.codec, **self._attention
        )
        logits_V, kv, logprob_T = forward.prefill(self.model, params, token_T, length, attend, wants_logprobs)
        count_V = counts_of_prompt(token_T, length, self.model.config.vocab_size)
        token, sampling, result = self.resample(logits_V, count_V, length, sampling)
        return Prefix(kv, length, token, sampling, logits_V, count_V, logprob_T), result

    def resample(
        self, logits_V: jax.Array, count_V: jax.Array, length: jax.Array, sampling: SlotSampling
    ) -> tuple[jax.Array, SlotSampling, StepResult]:
        """A prompt's first token: (token, the parameters as they go into the prefix, result)."""
        sampling = replace(sampling, min_tokens=sampling.min_tokens + length)  # a position, as a step's tokens have
        of_one = jax.tree.map(lambda value: value[None], sampling)
        token_B = sample(logits_V[None], count_V[None], of_one, length[None])
        return token_B[0], sampling, self._result(logits_V[None], token_B, jnp.ones((1,), bool), of_one)

    def force(self, logits_V: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A given first token: (token, its log-probability)."""
        return token, logprob_of(logits_V[None], token[None])[0]

    # Slots

    def empty_state(self) -> DecodeState:
        """All slots empty."""
        slots = self.layout.slots
        nothing_B = jnp.zeros((slots,), jnp.int32)
        count_BV = jnp.zeros((slots, self.model.config.vocab_size), jnp.uint16)
        return DecodeState(self.empty_cache(), nothing_B, nothing_B, SlotSampling.greedy(slots), count_BV)

    def insert(self, prefix: Prefix, state: DecodeState, slot: jax.Array, page_J: jax.Array) -> DecodeState:
        """A prefix into a slot, whose pages are `page_J`."""
        return DecodeState(
            self.store_prompt(state.cache, prefix.kv, page_J, prefix.length),
            state.token_B.at[slot].set(prefix.token),
            state.length_B.at[slot].set(prefix.length),
            _with_slot(state.sampling, slot, prefix.sampling),
            state.count_BV.at[slot].set(prefix.count_V),
        )

    def free(self, state: DecodeState, slot: jax.Array) -> DecodeState:
        """An empty slot. Its sampling goes back to greedy, so that it asks nothing of the sampler."""
        return replace(
            state,
            length_B=state.length_B.at[slot].set(0),
            sampling=_with_slot(state.sampling, slot, SlotSampling.of(GREEDY)),
        )

    # The cache

    def empty_cache(self) -> KV:
        """Zeros."""
        return self.layout.empty()

    def cache_sharding(self) -> KV:
        """A sharding for each of the cache's arrays."""
        return self.layout.shardings(self.mesh)[0]

    def decode(
        self, params: Params, state: DecodeState, page_BJ: jax.Array, live_B: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The model on each slot's last token: (logits_BV, new_LBKC, the rows to be stored)."""
        return forward.decode(self.model, params, state.token_B, state.length_B, self.attend(state, page_BJ))

    def store(self, cache: KV, new: Any, length_B: jax.Array, live_B: jax.Array, page_BJ: jax.Array) -> KV:
        """The cache with what `decode` left to be stored, in the live slots alone."""
        return cache_manager.flush(
            cache, new, length_B, live_B, page_BJ, codec=self.layout.codec, mesh=self.mesh, backend=self.backend
        )

    def store_prompt(self, cache: KV, kv: KV, page_J: jax.Array, length: jax.Array) -> KV:
        """The cache with a prefix's rows in a slot's pages."""
        return cache_manager.insert(cache, kv, page_J, length)

    # What the programs share

    def attend(self, state: DecodeState, page_BJ: jax.Array) -> Attend:
        """How the layers of a decode step attend to this state."""
        return attend_cache(state.cache, state.length_B, page_BJ, **self._attention)

    def state_sharding(self) -> DecodeState:
        """A sharding for each array of a state."""
        everywhere, rows = self.everywhere, self._vocabulary
        return DecodeState(self.cache_sharding(), everywhere, everywhere, self._sampling, self._at(None, *rows))

    def prefix_sharding(self) -> Prefix:
        """A sharding for each array of a prefix: where `insert` takes it."""
        everywhere, v = self.everywhere, self._at(*self._vocabulary)
        kv = self.layout.shardings(self.mesh)[1]
        return Prefix(kv, everywhere, everywhere, self._sampling, v, v, everywhere)

    @property
    def everywhere(self) -> Any:
        """The sharding of what every device holds."""
        return self._at()

    def jitted(self) -> "Jitted":
        """The programs, ready to be called or lowered; each is compiled when it is first called."""
        state, prefix, everywhere = self.state_sharding(), self.prefix_sharding(), self.everywhere
        return Jitted(
            prefill=jax.jit(self.prefill, out_shardings=(prefix, everywhere)),
            resample=jax.jit(self.resample, out_shardings=everywhere),
            force=jax.jit(self.force, out_shardings=everywhere),
            empty_state=jax.jit(self.empty_state, out_shardings=state),
            insert=jax.jit(self.insert, donate_argnums=1, out_shardings=state),
            generate=jax.jit(self.generate, donate_argnums=1, out_shardings=(state, everywhere)),
            score_step=jax.jit(self.score_step, donate_argnums=1, out_shardings=(state, everywhere)),
            free=jax.jit(self.free, donate_argnums=0, out_shardings=state),
        )

    def _result(
        self, logits_BV: jax.Array, token_B: jax.Array, live_B: jax.Array, sampling: SlotSampling
    ) -> StepResult:
        """One token of each live slot."""
        logprob_B, top_token_BP, top_logprob_BP = logprobs(logits_BV, token_B, sampling.logprobs, self.mesh)
        token_B = jnp.where(live_B, token_B, -1)
        of_one = [values[:, None] for values in (token_B, logprob_B, top_token_BP, top_logprob_BP)]
        return StepResult(of_one[0], live_B.astype(jnp.int32), *of_one[1:])

    @property
    def _attention(self) -> dict[str, Any]:
        shape = self.model.config
        return {
            "window_of_layer": shape.window_of_layer,
            "soft_cap": shape.attn_soft_cap,
            "mesh": self.mesh,
            "backend": self.backend,
        }

    @property
    def _vocabulary(self) -> PartitionSpec:
        """V lies as the logits come: as lm_head's rows, [V, D]."""
        return parameter_spec(self.model, "lm_head.weight", (self.model.config.vocab_size, 1), self.mesh)[:1]

    @property
    def _sampling(self) -> SlotSampling:
        return jax.tree.map(lambda _: self.everywhere, SlotSampling.of(GREEDY))

    def _at(self, *axes: Any) -> Any:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


class Jitted(NamedTuple):
    """The methods of `Programs` of the same names, as JAX calls, compiles and lowers them."""

    prefill: jax.stages.Wrapped
    resample: jax.stages.Wrapped
    force: jax.stages.Wrapped
    empty_state: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    generate: jax.stages.Wrapped
    score_step: jax.stages.Wrapped
    free: jax.stages.Wrapped


def given(token_B: jax.Array, logprob_B: jax.Array) -> jax.Array:
    """Tokens that the caller chose, as `Programs.step` takes them; `logprob_B` are any of the step's, f32.

    No log-probability is positive, but XLA does not know: so these tokens wait for the logits as chosen ones do.
    """
    return jnp.where(logprob_B > 0, -1, token_B)


def _with_slot(sampling: SlotSampling, slot: jax.Array, one: SlotSampling) -> SlotSampling:
    """All slots' parameters with one slot's replaced."""
    return jax.tree.map(lambda values_B, value: values_B.at[slot].set(value), sampling, one)
