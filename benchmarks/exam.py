"""What one engine is asked, so that another one's answers can be held against it: texts and their continuations.

The text comes with CPython: the help texts of `pydoc_data.topics`, some 460 kB of English.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..engine_impl.decode_step import Chosen, given
from ..engine_impl.engine import Engine
from ..engine_impl.errors import RefusedError
from ..engine_impl.forward import Params
from ..engine_impl.scoring import score
from ..engine_impl.session import Session
from ..engine_impl.state import DecodeState, Rows

WINDOW = 512
"""Tokens of one window of the text."""
CONTEXT = 256
"""Of a decoded window, so many are prefilled; those behind are decoded (tokens)."""
FORCED = 64
"""Tokens that are given to the decode step, one by one."""
PROMPT, ANSWER = 64, 64
"""Tokens of a prompt that is continued greedily, and of its answer."""
SLOTS = 16
"""Windows that are decoded together, and prompts."""


@dataclass(frozen=True)
class Exam:
    """Windows of the text, spread evenly over it; window_WT [windows, WINDOW] i32."""

    window_WT: np.ndarray

    @classmethod
    def of(cls, engine: Engine, tokens: int) -> "Exam":
        """About `tokens` tokens of the text, but never fewer windows than slots.

        Raises RefusedError for an engine that has no tokenizer: random weights have no perplexity worth measuring.
        """
        from pydoc_data.topics import topics

        if engine.get_tokenizer() is None:
            raise RefusedError(f"model={engine.model_name!r} has no tokenizer; give a checkpoint")
        token_ids = engine.get_tokenizer().encode("\n\n".join(topics[name] for name in sorted(topics)))
        windows = min(max(tokens // WINDOW, SLOTS), len(token_ids) // WINDOW)
        starts = np.linspace(0, len(token_ids) - WINDOW, windows).astype(int)
        return cls(np.array([token_ids[start : start + WINDOW] for start in starts], np.int32))

    def prefilled(self, engine: Engine, params: Params, tokens: int) -> list[float]:
        """Log-probabilities of about so many of the text's tokens, by prefill."""
        windows = self.window_WT[:: max(1, len(self.window_WT) * WINDOW // max(tokens, WINDOW))]
        session = Session(engine, params)
        return [logprob for window_T in windows for logprob in score(session, window_T.tolist())]

    def forced(self, engine: Engine, params: Params) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """The decode step's (logprob_NV f32 on the devices, next_token_N): of each position behind the context all the
        vocabulary's log-probabilities, and the token that the text has there."""
        window_NT = self._of_slots()
        step, session = _forced_step(engine), Session(engine, params)
        for slot, window_T in enumerate(window_NT):
            session.start_given(slot, window_T[: CONTEXT + 1].tolist())
        for at in range(CONTEXT + 1, CONTEXT + 1 + FORCED):
            slot_N = np.array(session.slots, np.int32)
            session.state, logprob_NV = step(params, session.state, slot_N, session.page_BJ[slot_N], window_NT[:, at])
            yield logprob_NV, window_NT[:, at]

    def continued(self, engine: Engine, params: Params) -> np.ndarray:
        """Greedy answers to the windows' beginnings, token_NA [SLOTS, ANSWER]."""
        session = Session(engine, params)
        firsts = [session.start(slot, window_T[:PROMPT].tolist()) for slot, window_T in enumerate(self._of_slots())]
        answers = [np.array([int(np.asarray(first.token_BW)[0, 0]) for first in firsts])]
        for _ in range(ANSWER - 1):
            answers.append(np.asarray(session.step().token_BW)[: len(firsts), 0])
        return np.stack(answers, axis=1)

    def _of_slots(self) -> np.ndarray:
        return self.window_WT[np.linspace(0, len(self.window_WT) - 1, SLOTS).astype(int)]


def _forced_step(engine: Engine) -> Callable[..., Any]:
    """`Engine.score_step` that tells the log-probability of every token, not of the given one alone."""
    programs = engine.programs

    def step(params: Params, state: DecodeState, slot_N, page_NJ, next_token_N) -> tuple[DecodeState, jax.Array]:
        def choose(logits_NV: jax.Array, rows: Rows, count_BV: jax.Array) -> Chosen:
            logprob_NV = jax.nn.log_softmax(logits_NV.astype(jnp.float32))
            token_N1 = given(next_token_N, logprob_NV[:, 0])[:, None]
            return Chosen(token_N1, rows.is_live_N.astype(jnp.int32), count_BV, logprob_NV)

        state, logprob_NV, _ = programs.step(params, state, programs.taken(state, slot_N), page_NJ, choose)
        return state, logprob_NV

    return jax.jit(step, donate_argnums=1, out_shardings=(programs.state_sharding(), None))
