"""A decode step: it reads the cache, keeps its new rows aside, chooses tokens, and stores the rows at its end.

That is `DecodeStep.step`, of which `generate`, `carry` and `score_step` are uses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .drafting import Slots, drafted, forced_first
from .forward import Params
from .prompts import Prompts
from .sampling.choose import sample
from .sampling.logprobs import logprob_of
from .sampling.mask import Mask
from .sampling.params import GREEDY
from .sampling.penalties import count_answer, counts_behind
from .sampling.slots import SlotSampling
from .speculation.drafts import Accepted, accept
from .state import DecodeState, PieceBatch, Prefix, Rows, StepResult, of_tokens


class Chosen(NamedTuple):
    """What follows from a step's logits."""

    token_NW: jax.Array
    """i32, what stands behind each token of the step; must depend on the logits, see `DecodeStep.step`"""
    count_N: jax.Array
    """i32, how many of them are each slot's next tokens"""
    count_BV: jax.Array
    """u16, as in DecodeState"""
    told: Any
    """what the step hands to its caller"""


Choose = Callable[[jax.Array, Rows, jax.Array], Chosen]
"""(logits_RV, the step's slots, the state's count_BV before it) -> Chosen"""


@dataclass(frozen=True, eq=False)
class DecodeStep(Prompts):
    """Programs over the slots."""

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
            sampling = jax.tree.map(partial(of_tokens, tokens=rows.width), rows.sampling)

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


def _last(token_NW: jax.Array, count_N: jax.Array) -> jax.Array:
    """Each slot's last token of so many."""
    if token_NW.shape[1] == 1:
        return token_NW[:, 0]
    return jnp.take_along_axis(token_NW, jnp.maximum(count_N - 1, 0)[:, None], axis=1)[:, 0]


def given(token_B: jax.Array, logprob_B: jax.Array) -> jax.Array:
    """Tokens that the caller chose, as `DecodeStep.step` takes them; `logprob_B` are any of the step's, f32.

    No log-probability is positive, but XLA does not know: so these tokens wait for the logits as chosen ones do.
    """
    return jnp.where(logprob_B > 0, -1, token_B)
