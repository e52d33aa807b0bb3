"""Which tokens may come next, where a grammar says so: a bit for each, in words of 32, made on the host.

While nobody asks, a program gets zeros that the devices have already, and its masking is a branch that is not taken.
Llama-3.1-8B on eight v5e, 96 slots (libtpu 0.0.42): a step of 8.3 M static cycles pays none for it, 2 thousand more
where somebody samples, and 136 thousand where somebody asks. The zeros take 1.5 MiB on each chip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """u32, token v may come if bit v % 32 of word v // 32 is set"""

    @classmethod
    def nothing(cls, rows: int, vocab_size: int) -> "Mask":
        """Nobody asks."""
        return cls(np.zeros(rows, bool), np.zeros((rows, -(-vocab_size // BITS)), np.uint32))

    def applied(self, logits_RV: jax.Array) -> jax.Array:
        """Logits, f32, with -inf for the tokens that may not come. Where a slot has several rows side by side it is the
        first that the mask is of."""
        slots, (rows, vocab_size) = self.is_asked_B.shape[0], logits_RV.shape
        bit_BW32 = (self.word_BW[:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1
        may_come_BV = bit_BW32.reshape(slots, -1)[:, :vocab_size] != 0
        may_come_BV |= ~self.is_asked_B[:, None]
        if rows > slots:
            others = jnp.ones((slots, rows // slots - 1, vocab_size), bool)
            may_come_BV = jnp.concatenate([may_come_BV[:, None], others], axis=1).reshape(logits_RV.shape)
        masked_RV = jnp.where(may_come_BV, logits_RV, -jnp.inf)
        # The TPU compiler would transpose, and so copy all logits where nobody asks.
        return with_layout_constraint(masked_RV, Layout(major_to_minor=(0, 1)))


class Masks:
    """Brings masks to the devices."""

    def __init__(self, vocab_size: int, sharding: Any) -> None:
        """`vocab_size`: of the logits; tokens beyond a tokenizer's own may not come where a grammar is asked for."""
        self._vocab_size, self._sharding = vocab_size, sharding
        self._nothing: dict[int, Mask] = {}

    def of(self, rows: int, asked: Sequence[tuple[int, np.ndarray]]) -> Mask:
        """Of so many rows; `asked` are (row, its words, u32). It is on its way when this returns."""
        if not asked:
            if rows not in self._nothing:
                self._nothing[rows] = placed(Mask.nothing(rows, self._vocab_size), self._sharding)
            return self._nothing[rows]
        mask = Mask.nothing(rows, self._vocab_size)
        for row, word_W in asked:
            mask.is_asked_B[row] = True
            mask.word_BW[row, : len(word_W)] = word_W
        return placed(mask, self._sharding)
