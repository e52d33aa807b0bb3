"""The device programs: plain functions from arrays to arrays, compiled by `Programs.jitted`.

A decode step reads the cache, keeps its new rows aside, chooses tokens, and stores the rows at its end. That is
`Programs.step`, of which `generate`, `carry` and `score_step` are uses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import cache_manager
from ..cache_manager import KV, CacheLayout
from ..kernels import Backend
from . import forward
from .attention import Attend, attend_both, attend_cache, attend_chunk
from .forward import Decoded, Params, Prefilled
from .models.decoder import Decoder
from .sampling.choose import sample
from .sampling.logprobs import Logprobs, logprob_of, logprobs
from .sampling.mask import Mask
from .sampling.params import SamplingParams
from .sampling.penalties import count_answer
from .sampling.slots import SlotSampling
from .state import DecodeState, PieceBatch, Prefix, Rows, StepResult
from .weights.sharding import parameter_spec

GREEDY = SamplingParams()


class Chosen(NamedTuple):
    """What follows from a step's logits."""

    token_N: jax.Array
    """i32, each slot's next token; must depend on the logits, see `Programs.step`"""
    count_BV: jax.Array
    """u16, as in DecodeState"""
    told: Any
    """what the step hands to its caller"""


Choose = Callable[[jax.Array, Rows, jax.Array], Chosen]
"""(logits_NV, the step's slots, the state's count_BV before it) -> Chosen"""


@dataclass(frozen=True, eq=False)
class Programs:
    """One model on one mesh. The five methods behind "The cache" decide how rows are stored; a baseline overrides them.

    A step takes N slots by their numbers; a number that no slot has is nobody's, and nothing is stored for it. All
    programs that store donate the state. Those that touch the cache take the texts' rows of the page table: whose pages
    are whose is the host's knowledge.
    """

    model: Decoder
    mesh: Mesh
    layout: CacheLayout
    backend: Backend
    has_adapters: bool
    """whether slots and pieces carry an adapter's index"""

    @property
    def cache_length(self) -> int:
        """Tokens of a full slot: the cache's rows, at most the model's positions."""
        return min(self.layout.length, self.model.config.context_length)

    # A decode step

    def step(
        self,
        params: Params,
        state: DecodeState,
        slot_N: jax.Array,
        page_NJ: jax.Array,
        choose: Choose,
        pieces: PieceBatch | None = None,
    ) -> tuple[DecodeState, Any, Prefix | None]:
        """One token for every live slot of those named: (state, what `choose` tells, the prefix of the pieces that it
        carries along)."""
        rows, prefix = self.taken(state, slot_N), None
        if pieces is None:
            logits_NV, new = self.decode(params, state.cache, rows, page_NJ)
        else:
            (logits_NV, new), prefix = self.decode_and_prefill(params, state.cache, rows, page_NJ, pieces)
        chosen_N, count_BV, told = choose(logits_NV, rows, state.count_BV)
        token_N = jnp.where(rows.is_live_N, chosen_N, rows.token_N)
        # No token is negative, but XLA does not know: so the flush waits for the last layer's attention too. Nothing
        # else orders the two, and to keep that read safe XLA:CPU would copy the whole cache, every step.
        cache = self.store(state.cache, new, rows.length_N, rows.is_live_N & (token_N >= 0), page_NJ)
        token_B = state.token_B.at[slot_N].set(token_N, mode="drop")
        length_B = state.length_B.at[slot_N].set(rows.length_N + rows.is_live_N, mode="drop")
        return DecodeState(cache, token_B, length_B, state.sampling, count_BV, state.adapter_B), told, prefix

    def generate(
        self, params: Params, state: DecodeState, slot_N: jax.Array, page_NJ: jax.Array, mask: Mask
    ) -> tuple[DecodeState, StepResult]:
        """The step that serves: each slot's token is chosen by its own sampling parameters, of those that may come."""
        state, result, _ = self.step(params, state, slot_N, page_NJ, self._serving(slot_N, mask))
        return state, result

    def carry(
        self,
        params: Params,
        state: DecodeState,
        slot_N: jax.Array,
        page_NJ: jax.Array,
        pieces: PieceBatch,
        mask: Mask,
    ) -> tuple[DecodeState, StepResult, Prefix | None]:
        """`generate`, with pieces beside it: (state, result, prefix)."""
        return self.step(params, state, slot_N, page_NJ, self._serving(slot_N, mask), pieces)

    def _serving(self, slot_N: jax.Array, mask: Mask) -> Choose:
        def choose(logits_NV: jax.Array, rows: Rows, count_BV: jax.Array) -> Chosen:
            count_BV = count_answer(count_BV, slot_N, rows.token_N, rows.sampling.is_penalised, self.mesh)
            # The text so far is `length` cached tokens and this step's own: the chosen token stands behind both.
            token_N = sample(logits_NV, lambda: count_BV[slot_N], rows.sampling, rows.length_N + 1, mask)
            return Chosen(token_N, count_BV, self._result(logits_NV, token_N, rows.is_live_N, rows.sampling))

        return choose

    def score_step(
        self, params: Params, state: DecodeState, slot_N: jax.Array, page_NJ: jax.Array, next_token_N: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        """The step with given tokens: (state, logprob_N f32, each given token's)."""

        def choose(logits_NV: jax.Array, rows: Rows, count_BV: jax.Array) -> Chosen:
            logprob_N = logprob_of(logits_NV, next_token_N)
            return Chosen(given(next_token_N, logprob_N), count_BV, logprob_N)

        state, logprob_N, _ = self.step(params, state, slot_N, page_NJ, choose)
        return state, logprob_N

    def taken(self, state: DecodeState, slot_N: jax.Array) -> Rows:
        """The small state of the slots named."""

        def of(values_B: jax.Array) -> jax.Array:
            return values_B.at[slot_N].get(mode="clip")

        length_N = jnp.where(slot_N < self.layout.slots, of(state.length_B), 0)
        is_live_N = (length_N > 0) & (length_N < self.cache_length)

        def of_live(values_B: jax.Array, otherwise: jax.Array) -> jax.Array:
            is_live = is_live_N.reshape(-1, *[1] * (values_B.ndim - 1))
            return jnp.where(is_live, of(values_B), otherwise)

        sampling = jax.tree.map(of_live, state.sampling, SlotSampling.of(GREEDY))
        adapter_N = None if state.adapter_B is None else of_live(state.adapter_B, jnp.int32(0))
        return Rows(slot_N, is_live_N, of(state.token_B), length_N, sampling, adapter_N)

    # A text

    def prefill(self, params: Params, cache: KV, pieces: PieceBatch) -> Prefix:
        """Padded pieces' keys and values; see `forward.prefill`. No token is chosen yet."""
        attend = self._attend_pieces(cache, pieces)
        return self._prefix(pieces, forward.prefill(self.model, params, pieces, attend, self.mesh))

    def first_tokens(
        self,
        logits_NV: jax.Array,
        start_N: jax.Array,
        count_N: jax.Array,
        is_complete_N: jax.Array,
        sampling: SlotSampling,
        count_NV: jax.Array,
        mask: Mask,
    ) -> tuple[jax.Array, SlotSampling, jax.Array, StepResult]:
        """The token behind each text that is complete: (token_N, sampling and count_NV as they go into the prefix,
        result)."""
        token_N = sample(logits_NV, lambda: count_NV, sampling, start_N + count_N, mask)
        return token_N, sampling, count_NV, self._result(logits_NV, token_N, is_complete_N, sampling)

    # Slots

    def empty_state(self) -> DecodeState:
        """All slots empty."""
        slots = self.layout.slots
        nothing_B = jnp.zeros((slots,), jnp.int32)
        count_BV = jnp.zeros((slots, self.model.config.vocab_size), jnp.uint16)
        adapter_B = nothing_B if self.has_adapters else None
        return DecodeState(self.empty_cache(), nothing_B, nothing_B, SlotSampling.greedy(slots), count_BV, adapter_B)

    def insert(self, prefix: Prefix, state: DecodeState, slot_N: jax.Array, page_NJ: jax.Array) -> DecodeState:
        """Pieces into their texts' pages; complete texts into their slots too."""

        def into(values_B: jax.Array, values_N: jax.Array) -> jax.Array:
            return values_B.at[slot_N].set(values_N, mode="drop")

        return DecodeState(
            self.store_texts(state.cache, prefix.kv, page_NJ, prefix.start_N, prefix.count_N),
            into(state.token_B, prefix.token_N),
            into(state.length_B, prefix.start_N + prefix.count_N),
            jax.tree.map(into, state.sampling, prefix.sampling),
            into(state.count_BV, prefix.count_NV),
            jax.tree.map(into, state.adapter_B, prefix.adapter_N),
        )

    # The cache

    def empty_cache(self) -> KV:
        """Zeros."""
        return self.layout.empty()

    def cache_sharding(self) -> KV:
        """A sharding for each of the cache's arrays."""
        return self.layout.shardings(self.mesh)[0]

    def decode(self, params: Params, cache: KV, rows: Rows, page_NJ: jax.Array) -> Decoded:
        """The model on each slot's last token."""
        attend = self.attend(cache, rows.length_N, page_NJ)
        return forward.decode(self.model, params, rows.token_N, rows.length_N, attend, rows.adapter_N)

    def decode_and_prefill(
        self, params: Params, cache: KV, rows: Rows, page_NJ: jax.Array, pieces: PieceBatch
    ) -> tuple[Decoded, Prefix]:
        """`decode` and `prefill` in one pass over the weights."""
        step, chunk = self.attend(cache, rows.length_N, page_NJ), self._attend_pieces(cache, pieces)
        attend = attend_both(step, chunk, rows.slot_N.shape[0])
        decoded, prefilled = forward.carry(
            self.model, params, rows.token_N, rows.length_N, pieces, attend, self.mesh, rows.adapter_N
        )
        return decoded, self._prefix(pieces, prefilled)

    def store(self, cache: KV, new: Any, length_N: jax.Array, live_N: jax.Array, page_NJ: jax.Array) -> KV:
        """The cache with what `decode` left to be stored, of the live slots alone."""
        new_LNWKC, count_N = new[:, :, None], live_N.astype(jnp.int32)
        return cache_manager.flush(
            cache, new_LNWKC, length_N, count_N, page_NJ, codec=self.layout.codec, mesh=self.mesh, backend=self.backend
        )

    def store_texts(self, cache: KV, kv: KV, page_NJ: jax.Array, start_N: jax.Array, count_N: jax.Array) -> KV:
        """The cache with pieces' rows in their texts' pages."""
        return cache_manager.insert(cache, kv, page_NJ, start_N, count_N)

    # What the programs share

    def attend(self, cache: KV, length_N: jax.Array, page_NJ: jax.Array) -> Attend:
        """How the layers of a decode step attend to texts of these lengths."""
        return attend_cache(cache, length_N, page_NJ, max_pages=self.layout.table_entries, **self._attention)

    def _attend_pieces(self, cache: KV, pieces: PieceBatch) -> Attend:
        return attend_chunk(cache, pieces.start_N, pieces.page_NJ, codec=self.layout.codec, **self._attention)

    def _prefix(self, pieces: PieceBatch, prefilled: Prefilled) -> Prefix:
        """No token is chosen yet."""
        (N, T), V = pieces.token_NT.shape, prefilled.logits_NV.shape[1]
        told = Logprobs(*(values.reshape(N, T, *values.shape[1:]) for values in prefilled.told))
        return Prefix(
            kv=prefilled.kv,
            start_N=pieces.start_N,
            count_N=pieces.count_N,
            logits_NV=prefilled.logits_NV,
            logprob_NT=told.chosen_B,
            top_token_NTP=told.top_token_BP,
            top_logprob_NTP=told.top_BP,
            token_N=jnp.full((N,), -1, jnp.int32),
            sampling=SlotSampling.greedy(N),
            count_NV=jnp.zeros((N, V), jnp.uint16),
            adapter_N=pieces.adapter_N,
        )

    def state_sharding(self) -> DecodeState:
        """A sharding for each array of a state."""
        everywhere, rows = self.everywhere, self._vocabulary
        adapters = everywhere if self.has_adapters else None
        return DecodeState(
            self.cache_sharding(), everywhere, everywhere, self._sampling, self._at(None, *rows), adapters
        )

    def prefix_sharding(self) -> Prefix:
        """A sharding for each array of a prefix: where `insert` takes it."""
        everywhere, v = self.everywhere, self._at(None, *self._vocabulary)
        kv = self.layout.shardings(self.mesh)[1]
        adapters = everywhere if self.has_adapters else None
        told = everywhere, everywhere, everywhere
        return Prefix(kv, everywhere, everywhere, v, *told, everywhere, self._sampling, v, adapters)

    @property
    def everywhere(self) -> Any:
        """The sharding of what every device holds."""
        return self._at()

    def jitted(self) -> "Jitted":
        """The programs, ready to be called or lowered; each is compiled when it is first called."""
        state, prefix, everywhere = self.state_sharding(), self.prefix_sharding(), self.everywhere
        return Jitted(
            prefill=jax.jit(self.prefill, out_shardings=prefix),
            first_tokens=jax.jit(
                self.first_tokens, out_shardings=(prefix.token_N, prefix.sampling, prefix.count_NV, everywhere)
            ),
            empty_state=jax.jit(self.empty_state, out_shardings=state),
            insert=jax.jit(self.insert, donate_argnums=1, out_shardings=state),
            generate=jax.jit(self.generate, donate_argnums=1, out_shardings=(state, everywhere)),
            carry=jax.jit(self.carry, donate_argnums=1, out_shardings=(state, everywhere, prefix)),
            score_step=jax.jit(self.score_step, donate_argnums=1, out_shardings=(state, everywhere)),
        )

    def _result(
        self, logits_BV: jax.Array, token_B: jax.Array, live_B: jax.Array, sampling: SlotSampling
    ) -> StepResult:
        """One token of each slot, or text, that is live."""
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
    first_tokens: jax.stages.Wrapped
    empty_state: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    generate: jax.stages.Wrapped
    carry: jax.stages.Wrapped
    score_step: jax.stages.Wrapped


def given(token_B: jax.Array, logprob_B: jax.Array) -> jax.Array:
    """Tokens that the caller chose, as `Programs.step` takes them; `logprob_B` are any of the step's, f32.

    No log-probability is positive, but XLA does not know: so these tokens wait for the logits as chosen ones do.
    """
    return jnp.where(logprob_B > 0, -1, token_B)
