"""What one engine is asked, so that another one's answers can be held against it: texts and their continuations.

The text comes with CPython: the help texts of `pydoc_data.topics`, some 460 kB of English.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..engine_impl.engine import Engine
from ..engine_impl.errors import RefusedError
from ..engine_impl.forward import Params
from ..engine_impl.programs import Chosen, given
from ..engine_impl.scoring import score
from ..engine_impl.state import DecodeState

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
        return [logprob for window_T in windows for logprob in score(engine, params, window_T.tolist())]

    def forced(self, engine: Engine, params: Params) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """The decode step's (logprob_BV f32 on the devices, next_token_B): of each position behind the context all the
        vocabulary's log-probabilities, and the token that the text has there."""
        window_BT = self._of_slots()
        step = _forced_step(engine)
        state = self._prefilled_slots(engine, params, window_BT, CONTEXT)
        for at in range(CONTEXT + 1, CONTEXT + 1 + FORCED):
            state, logprob_BV = step(params, state, window_BT[:, at])
            yield logprob_BV, window_BT[:, at]

    def continued(self, engine: Engine, params: Params) -> np.ndarray:
        """Greedy answers to the windows' beginnings, token_BA [SLOTS, ANSWER]."""
        window_BT = self._of_slots()
        state = engine.init_decode_state()
        first_B = []
        for slot, window_T in enumerate(window_BT):
            prefix, first = engine.prefill(params, *engine.pad(window_T[:PROMPT].tolist()))
            state = engine.insert(prefix, state, slot)
            first_B.append(int(first.token_BW[0, 0]))
        answers = [np.array(first_B)]
        for _ in range(ANSWER - 1):
            state, result = engine.generate(params, state)
            answers.append(np.asarray(result.token_BW)[:, 0])
        return np.stack(answers, axis=1)

    def _of_slots(self) -> np.ndarray:
        return self.window_WT[np.linspace(0, len(self.window_WT) - 1, SLOTS).astype(int)]

    def _prefilled_slots(self, engine: Engine, params: Params, window_BT: np.ndarray, length: int) -> DecodeState:
        """Each window's first tokens in its slot, and the one behind them as the next step's."""
        state = engine.init_decode_state()
        for slot, window_T in enumerate(window_BT):
            prefix, _ = engine.prefill(params, *engine.pad(window_T[:length].tolist()))
            prefix, _ = engine.force(prefix, int(window_T[length]))
            state = engine.insert(prefix, state, slot)
        return state


def _forced_step(engine: Engine) -> Callable[..., Any]:
    """`Engine.score_step` that tells the log-probability of every token, not of the given one alone."""
    programs = engine.programs

    def step(params: Params, state: DecodeState, page_BJ, next_token_B) -> tuple[DecodeState, jax.Array]:
        def choose(logits_BV: jax.Array, state: DecodeState, live_B: jax.Array) -> Chosen:
            logprob_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
            return Chosen(given(next_token_B, logprob_BV[:, 0]), state.count_BV, logprob_BV)

        return programs.step(params, state, page_BJ, choose)

    jitted = jax.jit(step, donate_argnums=1, out_shardings=(programs.state_sharding(), None))
    return lambda params, state, next_token_B: jitted(params, state, engine.page_BJ, next_token_B)
