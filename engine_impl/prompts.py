"""A text's way into the cache: its pieces' keys and values, the token behind it, and its slot."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ..cache_manager import KV
from . import forward
from .attention import attend_both
from .caching import Caching
from .forward import Decoded, Params, Prefilled
from .sampling.choose import sample
from .sampling.logprobs import Logprobs, logprobs
from .sampling.mask import Mask
from .sampling.slots import SlotSampling
from .speculation.drafts import Accepted, Drafts
from .speculation.texts import Texts
from .state import DecodeState, PieceBatch, Prefix, Rows, StepResult


@dataclass(frozen=True, eq=False)
class Prompts(Caching):
    """Programs over pieces of texts."""

    def prefill(self, params: Params, cache: KV, pieces: PieceBatch, draft_cache: KV | None = None) -> Prefix:
        """Padded pieces' keys and values. No token is chosen yet."""
        prefix = self._prefix(pieces, self.prefilled(params, cache, pieces))
        return self._drafts_too(params, draft_cache, pieces, prefix)

    def _drafts_too(self, params: Params, draft_cache: KV | None, pieces: PieceBatch, prefix: Prefix) -> Prefix:
        """With the draft model's keys and values of the same pieces."""
        if self.drafting is None or self.drafting.model is None or draft_cache is None:
            return prefix
        plain = pieces._replace(adapter_N=None)
        return replace(prefix, draft_kv=self.drafting.model.prefilled(params["draft"], draft_cache, plain).kv)

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

    def decode_and_prefill(
        self, params: Params, state: DecodeState, rows: Rows, page_NJ: jax.Array, pieces: PieceBatch
    ) -> tuple[Decoded, Prefix]:
        """`decode` and `prefill` in one pass over the weights."""
        step, chunk = self.attend(state.cache, rows.length_N, page_NJ), self._attend_pieces(state.cache, pieces)
        attend = attend_both(step, chunk, rows.slot_N.shape[0])
        decoded, prefilled = forward.carry(self.model, params, rows, pieces, attend, self.mesh)
        prefix = self._prefix(pieces, prefilled)
        return decoded, self._drafts_too(params, state.draft_cache, pieces, prefix)

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
