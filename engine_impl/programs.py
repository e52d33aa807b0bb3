"""The device programs: plain functions from arrays to arrays, compiled by `Programs.jitted`.

A decode step reads the cache, keeps its new rows aside, chooses tokens, and stores the rows at its end. That is
`Programs.step`, of which `generate`, `carry` and `score_step` are uses.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import cache_manager
from ..cache_manager import KV, CacheLayout
from ..kernels import Backend
from . import forward
from .attention import Attend, attend_both, attend_cache, attend_chunk
from .drafting import Propose, Slots, drafted, forced_first
from .forward import Decoded, Params, Prefilled
from .models.decoder import Decoder
from .sampling.choose import sample
from .sampling.logprobs import Logprobs, logprob_of, logprobs
from .sampling.mask import Mask
from .sampling.params import SamplingParams
from .sampling.penalties import count_answer, counts_behind
from .sampling.slots import SlotSampling
from .speculation.drafts import Accepted, Drafts, accept
from .speculation.texts import Texts
from .state import DecodeState, PieceBatch, Prefix, Rows, StepResult
from .weights.sharding import parameter_spec

GREEDY = SamplingParams()


class Chosen(NamedTuple):
    """What follows from a step's logits."""

    token_NW: jax.Array
    """i32, what stands behind each token of the step; must depend on the logits, see `Programs.step`"""
    count_N: jax.Array
    """i32, how many of them are each slot's next tokens"""
    count_BV: jax.Array
    """u16, as in DecodeState"""
    told: Any
    """what the step hands to its caller"""


Choose = Callable[[jax.Array, Rows, jax.Array], Chosen]
"""(logits_RV, the step's slots, the state's count_BV before it) -> Chosen"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Drafting:
    """What a step drafts by."""

    propose: Propose
    model: "Programs | None" = None
    """the draft model's, for what is not found; of the same slots and pages"""


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
    drafting: Drafting | None = field(default=None, kw_only=True)
    """None: every step brings one token"""

    @property
    def cache_length(self) -> int:
        """Tokens of a full slot: the cache's rows, at most the model's positions."""
        return min(self.layout.length, self.model.config.context_length)

    def reach_of(self, length: int) -> int:
        """As of the model, and of the draft model where there is one: a length that means the same to both."""
        ours = self.model.config.reach_of(length)
        return ours if self._small is None else max(ours, self._small.reach_of(length))

    @property
    def has_reaches(self) -> bool:
        """Whether texts may differ in their angles."""
        return self.reach_of(sys.maxsize) > 0

    # A decode step

    def step(
        self,
        params: Params,
        state: DecodeState,
        rows: Rows,
        page_NJ: jax.Array,
        choose: Choose,
        pieces: PieceBatch | None = None,
    ) -> tuple[DecodeState, Any, Prefix | None]:
        """Up to W tokens for every live slot of those taken: (state, what `choose` tells, the prefix of the pieces that
        it carries along)."""
        prefix = None
        if pieces is None:
            logits_RV, new = self.decode(params, state.cache, rows, page_NJ)
        else:
            (logits_RV, new), prefix = self.decode_and_prefill(params, state, rows, page_NJ, pieces)
        token_NW, count_N, count_BV, told = choose(logits_RV, rows, state.count_BV)
        # No token is negative, but XLA does not know: so the flush waits for the last layer's attention too. Nothing
        # else orders the two, and to keep that read safe XLA:CPU would copy the whole cache, every step.
        stored_N = jnp.where(token_NW[:, 0] >= 0, count_N, 0)
        cache = self.store(state.cache, new, rows.length_N, stored_N, page_NJ)
        texts = state.texts
        if texts is not None:
            texts = texts.longer(rows.slot_N, rows.length_N + 1, token_NW, count_N)

        def into(values_B: jax.Array, values_N: jax.Array) -> jax.Array:
            return values_B.at[rows.slot_N].set(values_N, mode="drop")

        token_N = jnp.where(count_N > 0, _last(token_NW, count_N), rows.token_NW[:, 0])
        state = replace(
            state,
            cache=cache,
            token_B=into(state.token_B, token_N),
            length_B=into(state.length_B, rows.length_N + count_N),
            count_BV=count_BV,
            texts=texts,
        )
        return state, told, prefix

    def generate(
        self,
        params: Params,
        state: DecodeState,
        slot_N: jax.Array,
        page_NJ: jax.Array,
        mask: Mask,
        width: int = 1,
    ) -> tuple[DecodeState, StepResult]:
        """The step that serves: each slot's tokens are chosen by its own sampling parameters of those that may come."""
        state, rows = self._begun(params, state, slot_N, page_NJ, mask, width)
        state, result, _ = self.step(params, state, rows, page_NJ, self._serving(mask))
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
        """`generate` of width 1, with pieces beside it: (state, result, prefix)."""
        state, rows = self._begun(params, state, slot_N, page_NJ, mask, 1)
        return self.step(params, state, rows, page_NJ, self._serving(mask), pieces)

    def _begun(
        self, params: Params, state: DecodeState, slot_N: jax.Array, page_NJ: jax.Array, mask: Mask, width: int
    ) -> tuple[DecodeState, Rows]:
        """The slots with their drafts: (the state, where the draft model's rows of all but the last draft are stored;
        the step's rows)."""
        rows = self.taken(state, slot_N)
        if self.drafting is None or state.texts is None:
            return state, rows
        drafts = forced_first(self.drafting.propose(state.texts.of(slot_N), rows, width), mask)
        if self.drafting.model is not None and state.draft_cache is not None:
            slots = Slots(rows, page_NJ, lambda: state.count_BV[slot_N], self.cache_length)
            drafts, draft_cache = drafted(
                self.drafting.model, params["draft"], state.draft_cache, slots, drafts, self.model.config.vocab_size
            )
            drafts = forced_first(drafts, mask)
            state = replace(state, draft_cache=draft_cache)
        drafts = drafts._replace(count_N=jnp.where(rows.is_live_N, drafts.count_N, 0))
        is_taken_NW = jnp.arange(width - 1) < drafts.count_N[:, None]
        draft_NW = jnp.where(is_taken_NW, drafts.token_NW[:, :-1], 0)
        return state, replace(rows, token_NW=jnp.concatenate([rows.token_NW, draft_NW], axis=1), drafts=drafts)

    def _serving(self, mask: Mask) -> Choose:
        def choose(logits_RV: jax.Array, rows: Rows, count_BV: jax.Array) -> Chosen:
            sampling = jax.tree.map(rows.of_tokens, rows.sampling)

            def count_RV() -> jax.Array:
                """The text up to each token of the step and that token, as though its drafts were right."""
                behind = counts_behind(count_BV[rows.slot_N], rows.token_NW)[1:]
                return behind[0] if rows.width == 1 else jnp.stack(behind, axis=1).reshape(logits_RV.shape)

            # The text so far is `length` cached tokens and this step's own: a chosen token stands behind both.
            token_R = sample(logits_RV, count_RV, sampling, (rows.position_NW + 1).reshape(-1), mask)
            token_NW, room_N = token_R.reshape(rows.token_NW.shape), rows.is_live_N.astype(jnp.int32)
            if rows.drafts is None:
                accepted = Accepted(jnp.zeros_like(room_N), room_N)
            else:
                room_N *= self.cache_length - rows.length_N
                accepted = accept(token_NW, rows.drafts, room_N)
            # What is cached is counted: of the step's tokens as many as it brings. Behind what was read, as the flush.
            counted_N = jnp.where(rows.sampling.is_penalised & (token_NW[:, 0] >= 0), accepted.count_N, 0)
            count_BV = count_answer(count_BV, rows.slot_N, rows.token_NW, counted_N, self.mesh)
            result = self._result(logits_RV, token_NW, sampling, accepted, rows.drafts)
            return Chosen(token_NW, accepted.count_N, count_BV, result)

        return choose

    def score_step(
        self, params: Params, state: DecodeState, slot_N: jax.Array, page_NJ: jax.Array, next_token_N: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        """The step with given tokens: (state, logprob_N f32, each given token's). Nothing drafts."""

        def choose(logits_NV: jax.Array, rows: Rows, count_BV: jax.Array) -> Chosen:
            logprob_N = logprob_of(logits_NV, next_token_N)
            token_N1 = given(next_token_N, logprob_N)[:, None]
            return Chosen(token_N1, rows.is_live_N.astype(jnp.int32), count_BV, logprob_N)

        state, logprob_N, _ = self.step(params, state, self.taken(state, slot_N), page_NJ, choose)
        return state, logprob_N

    def taken(self, state: DecodeState, slot_N: jax.Array) -> Rows:
        """The small state of the slots named, without drafts."""

        def of(values_B: jax.Array) -> jax.Array:
            return values_B.at[slot_N].get(mode="clip")

        length_N = jnp.where(slot_N < self.layout.slots, of(state.length_B), 0)
        is_live_N = (length_N > 0) & (length_N < self.cache_length)

        def of_live(values_B: jax.Array, otherwise: jax.Array) -> jax.Array:
            is_live = is_live_N.reshape(-1, *[1] * (values_B.ndim - 1))
            return jnp.where(is_live, of(values_B), otherwise)

        sampling = jax.tree.map(of_live, state.sampling, SlotSampling.of(GREEDY))
        adapter_N = None if state.adapter_B is None else of_live(state.adapter_B, jnp.int32(0))
        reach_N = None if state.reach_B is None else of(state.reach_B)
        return Rows(slot_N, is_live_N, of(state.token_B)[:, None], length_N, sampling, adapter_N, reach_N)

    # A text

    def prefill(self, params: Params, cache: KV, pieces: PieceBatch, draft_cache: KV | None = None) -> Prefix:
        """Padded pieces' keys and values; see `forward.prefill`. No token is chosen yet."""
        attend = self._attend_pieces(cache, pieces)
        prefix = self._prefix(pieces, forward.prefill(self.model, params, pieces, attend, self.mesh))
        return self._drafts_too(params, draft_cache, pieces, prefix)

    def _drafts_too(self, params: Params, draft_cache: KV | None, pieces: PieceBatch, prefix: Prefix) -> Prefix:
        """With the draft model's keys and values of the same pieces."""
        if self.drafting is None or self.drafting.model is None or draft_cache is None:
            return prefix
        plain = pieces._replace(adapter_N=None)
        return replace(prefix, draft_kv=self.drafting.model.prefill(params["draft"], draft_cache, plain).kv)

    def first_tokens(
        self,
        logits_NV: jax.Array,
        start_N: jax.Array,
        count_N: jax.Array,
        is_complete_N: jax.Array,
        sampling: SlotSampling,
        count_NV: jax.Array,
        mask: Mask,
        texts: Texts | None = None,
    ) -> tuple[jax.Array, SlotSampling, jax.Array, Texts | None, StepResult]:
        """The token behind each text that is complete: (token_N, sampling, count_NV and texts as they go into the
        prefix, result)."""
        length_N, complete_N = start_N + count_N, is_complete_N.astype(jnp.int32)
        token_N = sample(logits_NV, lambda: count_NV, sampling, length_N, mask)
        if texts is not None:
            texts = texts.longer(jnp.arange(len(token_N)), length_N, token_N[:, None], complete_N)
        accepted = Accepted(jnp.zeros_like(complete_N), complete_N)
        result = self._result(logits_NV, token_N[:, None], sampling, accepted, None)
        return token_N, sampling, count_NV, texts, result

    # Slots

    def empty_state(self) -> DecodeState:
        """All slots empty."""
        slots = self.layout.slots
        nothing_B = jnp.zeros((slots,), jnp.int32)
        count_BV = jnp.zeros((slots, self.model.config.vocab_size), jnp.uint16)
        return DecodeState(
            self.empty_cache(), nothing_B, nothing_B, SlotSampling.greedy(slots), count_BV,
            adapter_B=nothing_B if self.has_adapters else None,
            reach_B=nothing_B if self.has_reaches else None,
            texts=None if self.drafting is None else Texts.empty(slots, self.layout.length),
            draft_cache=None if self._small is None else self._small.empty_cache(),
        )  # fmt: skip

    def insert(self, prefix: Prefix, state: DecodeState, slot_N: jax.Array, page_NJ: jax.Array) -> DecodeState:
        """Pieces into their texts' pages; complete texts into their slots too."""

        def into(values_B: jax.Array, values_N: jax.Array) -> jax.Array:
            return values_B.at[slot_N].set(values_N, mode="drop")

        draft_cache = state.draft_cache
        if self._small is not None and draft_cache is not None and prefix.draft_kv is not None:
            where = page_NJ, prefix.start_N, prefix.count_N
            draft_cache = self._small.store_texts(draft_cache, prefix.draft_kv, *where)
        return DecodeState(
            self.store_texts(state.cache, prefix.kv, page_NJ, prefix.start_N, prefix.count_N),
            into(state.token_B, prefix.token_N),
            into(state.length_B, prefix.start_N + prefix.count_N),
            jax.tree.map(into, state.sampling, prefix.sampling),
            into(state.count_BV, prefix.count_NV),
            jax.tree.map(into, state.adapter_B, prefix.adapter_N),
            jax.tree.map(into, state.reach_B, prefix.reach_N),
            jax.tree.map(into, state.texts, prefix.texts),
            draft_cache,
        )

    # The cache

    def empty_cache(self) -> KV:
        """Zeros."""
        return self.layout.empty()

    def cache_sharding(self) -> KV:
        """A sharding for each of the cache's arrays."""
        return self.layout.shardings(self.mesh)[0]

    def decode(self, params: Params, cache: KV, rows: Rows, page_NJ: jax.Array) -> Decoded:
        """The model on each slot's last token and its drafts."""
        return forward.decode(self.model, params, rows, self.attend(cache, rows.length_N, page_NJ))

    def decode_and_prefill(
        self, params: Params, state: DecodeState, rows: Rows, page_NJ: jax.Array, pieces: PieceBatch
    ) -> tuple[Decoded, Prefix]:
        """`decode` and `prefill` in one pass over the weights."""
        step, chunk = self.attend(state.cache, rows.length_N, page_NJ), self._attend_pieces(state.cache, pieces)
        attend = attend_both(step, chunk, rows.slot_N.shape[0])
        decoded, prefilled = forward.carry(self.model, params, rows, pieces, attend, self.mesh)
        prefix = self._prefix(pieces, prefilled)
        return decoded, self._drafts_too(params, state.draft_cache, pieces, prefix)

    def store(self, cache: KV, new: Any, length_N: jax.Array, count_N: jax.Array, page_NJ: jax.Array) -> KV:
        """The cache with what `decode` left to be stored, the first `count` rows of each slot."""
        new_LNWKC = new.reshape(new.shape[0], len(length_N), -1, *new.shape[2:])
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
            reach_N=pieces.reach_N,
            texts=None if self.drafting is None else Texts.empty(N, self.layout.length),
        )

    def state_sharding(self) -> DecodeState:
        """A sharding for each array of a state."""
        everywhere, v = self.everywhere, self._at(None, *self._vocabulary)
        return DecodeState(
            self.cache_sharding(), everywhere, everywhere, self._sampling, v,
            adapter_B=everywhere if self.has_adapters else None,
            reach_B=everywhere if self.has_reaches else None,
            texts=None if self.drafting is None else Texts(everywhere, everywhere),
            draft_cache=None if self._small is None else self._small.cache_sharding(),
        )  # fmt: skip

    def prefix_sharding(self) -> Prefix:
        """A sharding for each array of a prefix: where `insert` takes it."""
        everywhere, v = self.everywhere, self._at(None, *self._vocabulary)
        told = everywhere, everywhere, everywhere
        return Prefix(
            self._text_sharding, everywhere, everywhere, v, *told, everywhere, self._sampling, v,
            adapter_N=everywhere if self.has_adapters else None,
            reach_N=everywhere if self.has_reaches else None,
            texts=None if self.drafting is None else Texts(everywhere, everywhere),
            draft_kv=None if self._small is None else self._small._text_sharding,
        )  # fmt: skip

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
                self.first_tokens,
                out_shardings=(prefix.token_N, prefix.sampling, prefix.count_NV, prefix.texts, everywhere),
            ),
            empty_state=jax.jit(self.empty_state, out_shardings=state),
            insert=jax.jit(self.insert, donate_argnums=1, out_shardings=state),
            generate=jax.jit(
                self.generate, donate_argnums=1, static_argnames="width", out_shardings=(state, everywhere)
            ),
            carry=jax.jit(self.carry, donate_argnums=1, out_shardings=(state, everywhere, prefix)),
            score_step=jax.jit(self.score_step, donate_argnums=1, out_shardings=(state, everywhere)),
        )

    def _result(
        self,
        logits_RV: jax.Array,
        token_NW: jax.Array,
        sampling: SlotSampling,
        accepted: Accepted,
        drafts: Drafts | None,
    ) -> StepResult:
        """The accepted tokens of each slot, or text. `sampling` is that of each of their rows."""
        (N, W), told = token_NW.shape, logprobs(logits_RV, token_NW.reshape(-1), sampling.logprobs, self.mesh)
        agreed_N, count_N = accepted
        is_valid_NW = jnp.arange(W) < count_N[:, None]
        return StepResult(
            jnp.where(is_valid_NW, token_NW, -1),
            count_N,
            jnp.zeros_like(count_N) if drafts is None else drafts.count_N,
            agreed_N,
            *(values.reshape(N, W, *values.shape[1:]) for values in told),
        )

    @property
    def _small(self) -> "Programs | None":
        return None if self.drafting is None else self.drafting.model

    @property
    def _text_sharding(self) -> KV:
        """Of pieces' rows."""
        return self.layout.shardings(self.mesh)[1]

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


def _last(token_NW: jax.Array, count_N: jax.Array) -> jax.Array:
    """Each slot's last token of so many."""
    if token_NW.shape[1] == 1:
        return token_NW[:, 0]
    return jnp.take_along_axis(token_NW, jnp.maximum(count_N - 1, 0)[:, None], axis=1)[:, 0]


def given(token_B: jax.Array, logprob_B: jax.Array) -> jax.Array:
    """Tokens that the caller chose, as `Programs.step` takes them; `logprob_B` are any of the step's, f32.

    No log-probability is positive, but XLA does not know: so these tokens wait for the logits as chosen ones do.
    """
    return jnp.where(logprob_B > 0, -1, token_B)
