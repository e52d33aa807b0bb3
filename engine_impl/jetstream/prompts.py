"""Prompts to the prefixes that JetStream carries about: computed in one piece, or behind another prefix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ...cache_manager import KV
from ..api import Opening, Piece
from ..engine import Engine
from ..errors import RefusedError
from ..forward import Params
from ..sampling.logprobs import nothing
from ..sampling.params import GREEDY, SamplingParams
from ..state import Prefix, StepResult


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JetStreamPrefix:
    """A prompt after prefill, and the first tokens of M answers to it."""

    text: Prefix
    """of one piece, which is the whole prompt; its token is the last of the M"""
    token_T: jax.Array
    """i32, the prompt's tokens, padded: a prefix that goes on computes those behind its last whole page again"""
    token_M: jax.Array
    """i32, each answer's first token; -1 = there is no answer"""
    seed_M: jax.Array
    """u32, what each answer's tokens are drawn by"""

    def __getitem__(self, key: str) -> "JetStreamPrefix":
        """JetStream's last source takes the `cache` out of a prefix to go on behind it. Here that is all of it, since
        the tokens belong to the rows."""
        if key != "cache":
            raise KeyError(key)
        return self

    def prompt_ids(self) -> list[int]:
        """The prompt's tokens; none for one that was refused."""
        (length,) = np.asarray(self.text.count_N)
        return np.asarray(self.token_T)[:length].tolist()


class Prompts:
    """One engine's. Not for two threads at the same time."""

    def __init__(self, engine: Engine, page_J: np.ndarray) -> None:
        """`page_J`: the numbers that one request's pages have in a cache of this object's own."""
        self._engine = engine
        self._page_J = page_J
        self._everywhere = NamedSharding(engine.mesh, PartitionSpec())
        at = engine.programs.cache_sharding()
        page_1J, start_1 = page_J[None], np.zeros(1, np.int32)
        self._scratch: KV = jax.jit(replace(engine.layout, pages=len(page_J)).empty, out_shardings=at)()
        """One request's pages."""

        def store(cache: KV, kv: KV, count_1: jax.Array) -> KV:
            return engine.programs.store_texts(cache, kv, jnp.asarray(page_1J), jnp.asarray(start_1), count_1)

        self._store = jax.jit(store, donate_argnums=0, out_shardings=at)
        self._join = jax.jit(_joined, static_argnums=3, out_shardings=engine.programs.prefix_sharding().kv)
        self._several = jax.jit(lambda *parts: jnp.concatenate(parts), out_shardings=self._everywhere)

    @property
    def longest(self) -> int:
        """Longest prompt (tokens)."""
        return min(self._engine.sizes.max_prefill_length, self._engine.sizes.prefill_chunk)

    def check(self, prompt_ids: Sequence[int]) -> None:
        """Raises RefusedError for a prompt that cannot be answered."""
        if not 0 < len(prompt_ids) <= self.longest:
            raise RefusedError(f"a prompt of {len(prompt_ids)} tokens must have from 1 to {self.longest}")
        vocab_size = self._engine.sizes.vocab_size
        for token_id in prompt_ids:
            if not 0 <= token_id < vocab_size:
                raise RefusedError(f"{token_id=} is outside the vocabulary; ids go to {vocab_size - 1}")

    def computed(
        self,
        params: Params,
        prompt_ids: Sequence[int],
        before: JetStreamPrefix | None,
        samplings: Sequence[SamplingParams],
    ) -> tuple[JetStreamPrefix, list[StepResult]]:
        """A prompt and its answers' first tokens, one for each sampling. The whole pages of `before`, a prefix with
        which the prompt begins, are not computed again."""
        shared = 0
        if before is not None:
            rows = self._engine.sizes.page_rows
            shared = min(len(before.prompt_ids()), len(prompt_ids) - 1) // rows * rows
        if not shared or before is None:
            return self._begun(self._piece(params, prompt_ids, 0), prompt_ids, samplings)
        self._scratch = self._store(self._scratch, before.text.kv, np.array([shared], np.int32))
        text = self._piece(params, prompt_ids, shared)
        return self._begun(self._joined(before.text.kv, text, prompt_ids, shared), prompt_ids, samplings)

    def refused(self, params: Params, samples: int) -> JetStreamPrefix:
        """A prefix that leaves its slots empty."""
        prefix, _ = self.computed(params, [0], None, [GREEDY])
        count_N, token_M = jax.device_put((np.zeros(1, np.int32), np.full(samples, -1, np.int32)), self._everywhere)
        seed_M = jax.device_put(np.zeros(samples, np.uint32), self._everywhere)
        text = replace(prefix.text, count_N=count_N, token_N=token_M[:1])
        return replace(prefix, text=text, token_M=token_M, seed_M=seed_M)

    def sharding(self) -> Any:
        """A tree like a JetStreamPrefix."""
        everywhere: Any = self._everywhere
        return JetStreamPrefix(self._engine.programs.prefix_sharding(), everywhere, everywhere, everywhere)

    def _piece(self, params: Params, prompt_ids: Sequence[int], shared: int) -> Prefix:
        """What stands behind a prompt's first `shared` tokens, which are in the cache of this object's own."""
        reach = self._engine.reach_of(self._engine.sizes.cache_length)  # how long an answer may become is not told
        piece = Piece(token_T=np.array(prompt_ids[shared:], np.int32), start=shared, page_J=self._page_J, reach=reach)
        return self._engine.prefill_behind(params, self._scratch, [piece])

    def _joined(self, before: KV, behind: Prefix, prompt_ids: Sequence[int], shared: int) -> Prefix:
        """The whole prompt as one piece."""
        _, tokens = self._engine.shapes.prefill_of([len(prompt_ids)])
        kv = self._join(before, behind.kv, np.int32(shared), tokens)
        whole = jax.device_put((np.zeros(1, np.int32), np.array([len(prompt_ids)], np.int32)), self._everywhere)
        nobodys = [np.zeros((1, *values.shape), values.dtype) for values in nothing(tokens)]
        logprob_NT, token_NTP, logprob_NTP = jax.device_put(nobodys, self._everywhere)
        told = {"logprob_NT": logprob_NT, "top_token_NTP": token_NTP, "top_logprob_NTP": logprob_NTP}
        return replace(behind, kv=kv, start_N=whole[0], count_N=whole[1], **told)

    def _begun(
        self, text: Prefix, prompt_ids: Sequence[int], samplings: Sequence[SamplingParams]
    ) -> tuple[JetStreamPrefix, list[StepResult]]:
        begun, results = [], []
        for sampling in samplings:
            opening = Opening(text=prompt_ids, prompt_length=len(prompt_ids), sampling=sampling)
            text, result = self._engine.first_tokens(text, [opening])
            begun.append(text)
            results.append(result)
        token_M = self._several(*(text.token_N for text in begun))
        seed_M = self._several(*(text.sampling.seed for text in begun))
        _, tokens = self._engine.shapes.prefill_of([len(prompt_ids)])
        padded_T = np.pad(np.array(prompt_ids, np.int32), (0, tokens - len(prompt_ids)))
        return JetStreamPrefix(text, jax.device_put(padded_T, self._everywhere), token_M, seed_M), results


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
