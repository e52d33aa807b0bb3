"""Our engine as google-jetstream 0.2.2's, its only release.

A prefill returns a prefix only and every token comes out of `generate`, so each call hands out the tokens sampled
before it and then computes the next: the first token comes from the first call after the insert, without waiting for
the step. A slot's answer ends with the first token that is marked invalid.

This JetStream never frees a slot. One whose answer ended with a stop token is emptied here, and so is one that
`idle_slots` names, where the host has set it. Without it a slot that reached max_tokens, which the engine is not told,
decodes on unheard until it is inserted into anew or its cache is full.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..engine import Engine
from ..forward import Params
from ..state import DecodeState
from .adapter import Adapter
from .prompts import JetStreamPrefix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WheelState:
    """All slots between two calls of generate."""

    decode: DecodeState
    next_BW: jax.Array
    """i32, what the next call hands out; -1 = none. W is 1: JetStream takes one token of a slot at a time"""
    handed_B: jax.Array
    """i32, tokens of the answer handed out so far"""


class WheelAdapter(Adapter):
    """Every method of its abstract engine."""

    def __init__(self, engine: Engine, params: Params) -> None:
        """Raises RefusedError for a cache that is too small for all slots' longest requests."""
        super().__init__(engine, params)
        self.idle_slots: Callable[[], Collection[int]] = tuple
        """Asked before every step: slots that nobody waits for."""
        stop_ids = self._stop_ids

        def hand_out(next_BW, handed_B, length_B, idle_B):
            next_B = jnp.squeeze(next_BW, axis=1)
            valid_B = next_B >= 0
            handed_B = handed_B + valid_B
            ended_B = idle_B | jnp.isin(next_B, stop_ids)
            data_B3 = jnp.stack([next_B, valid_B.astype(jnp.int32), handed_B], axis=1)
            return data_B3, handed_B, jnp.where(ended_B, 0, length_B)

        def take_up(next_BW, handed_B, token_N, slot):
            return next_BW.at[slot].set(token_N), handed_B.at[slot].set(0)

        self._hand_out = jax.jit(hand_out, out_shardings=self._everywhere)
        self._take_up = jax.jit(take_up, out_shardings=self._everywhere)

    def init_decode_state(self, *args: Any, **kwargs: Any) -> WheelState:
        """All slots empty."""
        none_BW = jax.device_put(np.full((self.max_concurrent_decodes, 1), -1, np.int32), self._everywhere)
        return WheelState(self._engine.init_decode_state(), none_BW, self._none_B())

    def prefill(
        self, *, params: Params, existing_prefix: JetStreamPrefix | None = None, padded_tokens: Any, true_length: int
    ) -> JetStreamPrefix:
        """Compute a prompt's keys and values and choose its first token, see `prefix_of`. JetStream has cut a prompt
        that is too long at its beginning, and then tells a `true_length` beyond the padded one's."""
        return self.prefix_of(params, padded_tokens, true_length, existing_prefix)[0]

    def insert(self, prefix: JetStreamPrefix, decode_state: WheelState, slot: int) -> WheelState:
        """Put a prefix into a slot, whatever was there; the state is donated, the prefix is not."""
        with self._turn:
            decode = self._inserted(prefix.text, decode_state.decode, slot)
            token_N = prefix.text.token_N
            taken_up = self._take_up(decode_state.next_BW, decode_state.handed_B, token_N, np.int32(slot))
        return WheelState(decode, *taken_up)

    def generate(self, params: Params, decode_state: WheelState) -> tuple[WheelState, Any]:
        """Hand out one token of every slot and compute the next. The state is donated.

        The result's data is i32 [B, 3]: the token, whether it is one, and how many its answer has with it.
        """
        # JetStream starts up to eight steps before it reads the first one's tokens: prompts and finished slots would
        # wait behind them. Here the step before the last has to be done; the last one may still run.
        decode_state.handed_B.block_until_ready()
        decode = decode_state.decode
        idle_B = np.zeros(self.max_concurrent_decodes, bool)
        idle_B[list(self.idle_slots())] = True
        with self._turn:
            data_B3, handed_B, length_B = self._hand_out(
                decode_state.next_BW, decode_state.handed_B, decode.length_B, idle_B
            )
            decode, result = self._generated(params, replace(decode, length_B=length_B))
        return WheelState(decode, result.token_BW, handed_B), self._told(data_B3)

    def _told(self, data_B3: jax.Array) -> Any:
        return self.api.ResultTokens(
            data=data_B3, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )
