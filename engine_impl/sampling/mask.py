"""Which tokens may come next, where a grammar says so: a bit for each, in words of 32, made on the host.

While nobody asks, a program gets zeros that the devices have already, and its masking is a branch that is not taken.
Llama-3.1-8B on eight v5e, 96 slots (libtpu 0.0.42): a step of 8.3 M static cycles pays none for it, 2 thousand more
where somebody samples, and 136 thousand where somebody asks. The zeros take 1.5 MiB on each chip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from ..placing import placed

BITS = 32
"""Of a word."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Of a step's slots, or of the texts behind a prefill."""

    is_asked_B: Any
    """bool; where it is false, every token may come"""
    word_BW: Any
    """u32, token v may come, behind those that must, if bit v % 32 of word v // 32 is set"""
    forced_BF: Any = None
    """i32, in a step of F + 1 tokens: what must come first, -1 behind it; None in a step of one"""

    @classmethod
    def nothing(cls, rows: int, vocab_size: int, width: int = 1) -> "Mask":
        """Nobody asks."""
        forced_BF = None if width == 1 else np.full((rows, width - 1), -1, np.int32)
        return cls(np.zeros(rows, bool), np.zeros((rows, -(-vocab_size // BITS)), np.uint32), forced_BF)

    def applied(self, logits_RV: jax.Array) -> jax.Array:
        """Logits, f32, with -inf for the tokens that may not come. A slot has its step's rows side by side; behind the
        one that `word_BW` is of, every token may come."""
        slots, vocab_size = self.is_asked_B.shape[0], logits_RV.shape[1]
        bit_BW32 = (self.word_BW[:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1
        may_come_RV = bit_BW32.reshape(slots, -1)[:, :vocab_size] != 0
        may_come_RV |= ~self.is_asked_B[:, None]
        if self.forced_BF is not None:
            may_come_RV = self._of_rows(self.forced_BF, may_come_RV).reshape(logits_RV.shape)
        masked_RV = jnp.where(may_come_RV, logits_RV, -jnp.inf)
        # The TPU compiler would transpose, and so copy all logits where nobody asks.
        return with_layout_constraint(masked_RV, Layout(major_to_minor=(0, 1)))

    @staticmethod
    def _of_rows(forced_BF: jax.Array, may_come_BV: jax.Array) -> jax.Array:
        """bool [B, F + 1, V], from what may come behind the forced tokens."""
        forced_BW1 = jnp.pad(forced_BF, ((0, 0), (0, 1)), constant_values=-1)[:, :, None]
        is_forced_BW1 = forced_BW1 >= 0
        is_behind_BW1 = jnp.arange(forced_BW1.shape[1])[:, None] == is_forced_BW1.sum(axis=1, keepdims=True)
        is_it_BWV = jnp.arange(may_come_BV.shape[1]) == forced_BW1
        return jnp.where(is_forced_BW1, is_it_BWV, may_come_BV[:, None] | ~is_behind_BW1)


class Masks:
    """Brings masks to the devices."""

    def __init__(self, vocab_size: int, sharding: Any) -> None:
        """`vocab_size`: of the logits; tokens beyond a tokenizer's own may not come where a grammar is asked for."""
        self._vocab_size, self._sharding = vocab_size, sharding
        self._nothing: dict[tuple[int, int], Mask] = {}

    def of(self, rows: int, asked: Sequence["Asked"], width: int = 1) -> Mask:
        """Of so many rows of a step of this width. It is on its way when this returns."""
        if not asked:
            if (rows, width) not in self._nothing:
                nothing = Mask.nothing(rows, self._vocab_size, width)
                self._nothing[rows, width] = placed(nothing, self._sharding)
            return self._nothing[rows, width]
        mask = Mask.nothing(rows, self._vocab_size, width)
        for row, forced, word_W in asked:
            mask.is_asked_B[row] = True
            if len(forced) < width:
                mask.word_BW[row, : len(word_W)] = word_W
            else:  # the step has no place behind them
                token_id = int(forced[width - 1])
                mask.word_BW[row, token_id // BITS] = 1 << token_id % BITS
            if width > 1:
                mask.forced_BF[row, : len(forced)] = forced[: width - 1]
        return placed(mask, self._sharding)


class Asked(NamedTuple):
    """What a grammar says of a row's next tokens."""

    row: int
    forced: Sequence[int] | np.ndarray
    """i32, what must come first"""
    word_W: np.ndarray
    """u32, which may come behind them"""
