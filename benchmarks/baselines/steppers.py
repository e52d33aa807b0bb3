"""What is timed: decode steps with every slot live, ours and the baselines', behind one face."""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ...engine_impl.api import Opening
from ...engine_impl.engine import Engine
from ...engine_impl.forward import Params
from ...engine_impl.sampling.params import GREEDY
from ...engine_impl.session import Session
from ...engine_impl.state import DecodeState
from ..measure.timing import timed

PROMPT_LENGTH = 128


class Block(NamedTuple):
    """Steps timed one after another."""

    step_ms: list[float]
    tokens: list[list[int]]
    """each step's, of all slots"""


class Stepper(Protocol):
    """A batch that can be set to a length and stepped."""

    def fill(self, prompts: Sequence[list[int]]) -> None:
        """A prompt into each slot, all of one length."""
        ...

    def set_length(self, length: int) -> None:
        """As if every slot held so many tokens; rows that nobody wrote are zeros."""
        ...

    def block(self, steps: int) -> Block:
        """One token per slot and step."""
        ...


class EngineStepper:
    """Our engine, or one with its verbs."""

    def __init__(self, engine: Engine, params: Params) -> None:
        self._engine, self._params = engine, params
        self._session = Session(engine, params)
        self._attention: Any = None

    def fill(self, prompts: Sequence[list[int]]) -> None:
        self._session = Session(self._engine, self._params)
        prefixes = {}
        for slot, prompt in enumerate(prompts):
            if (key := tuple(prompt)) not in prefixes:
                opening = Opening(text=prompt, prompt_length=len(prompt), sampling=GREEDY)
                prefixes[key], _ = self._engine.first_tokens(self._session.prefilled(slot, prompt), [opening])
            self._session.insert(prefixes[key], slot)
        jax.block_until_ready(self._session.state)

    def set_length(self, length: int) -> None:
        # The same sharding as before: another would be another program to compile.
        state, slots = self._session.state, self._engine.sizes.slots
        lengths = np.full(slots, length, np.int32)
        self._session.state = replace(state, length_B=jax.device_put(lengths, state.length_B.sharding))
        self._session.slots = list(range(slots))
        jax.block_until_ready(self._session.state)

    def attention_ms(self, repeats: int) -> list[float]:
        """Decode attention alone, all layers one after another, over the slots as they are (ms per step)."""
        shape, dtype = self._engine.model.config, self._engine.layout.dtype
        slots, head_dim = self._engine.sizes.slots, shape.head_dim
        q_BNH, k_BKH = (jnp.ones((slots, heads, head_dim), dtype) for heads in (shape.num_heads, shape.num_kv_heads))
        if self._attention is None:
            # Not a method: it and the stepper would hold each other, and the cache with them, beside the next engine's.
            self._attention = jax.jit(functools.partial(_attend, self._engine))
        us = timed(lambda: self._attention(self._session.state, self._session.page_BJ, q_BNH, k_BKH), repeats)
        return [each / 1000 for each in us]

    def block(self, steps: int) -> Block:
        """As the server runs it: a step is started before the tokens of the one before are read."""
        ms, tokens, pending = [], [], None
        last = time.perf_counter()
        for _ in range(steps):
            result = self._session.step()
            result.token_BW.copy_to_host_async()
            if pending is not None:
                last = _read(pending, tokens, ms, last)
            pending = result.token_BW
        _read(pending, tokens, ms, last)
        return Block(ms, tokens)


def _attend(engine: Engine, state: DecodeState, page_BJ: jax.Array, q_BNH: jax.Array, k_BKH: jax.Array) -> jax.Array:
    attend = engine.programs.attend(state.cache, state.length_B, page_BJ)
    for layer, kind in enumerate(attend.kind_of_layer):
        q_BNH = attend.call(jnp.int32(layer), kind, q_BNH, k_BKH, k_BKH)  # the next layer waits for this one
    return q_BNH


def _read(token_BW: Any, tokens: list[list[int]], ms: list[float], last: float) -> float:
    """Waits for a step's tokens; its time is what has passed since the step before was there."""
    tokens.append(np.asarray(token_BW)[:, 0].tolist())
    now = time.perf_counter()
    ms.append((now - last) * 1000)
    return now
