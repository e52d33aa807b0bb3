"""The slots' texts on the devices, where drafts are looked for: prompt, answer, and what somebody predicted of it.

    token_BS  | prompt | answer so far |  free  | prompt's last | prediction |
              0                        length + 1  ^ predicted               S

The answer's token k stands before the prediction's token k, and never at its place or behind: so a prediction is read
before the answer overwrites it. Before it stand the prompt's last tokens, so that what the answer begins with is found
at the prediction's beginning as any other place is found.

S is the cache's length: 256 slots of 8,192 tokens take 8 MiB, which every device has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..api import Opening

LONGEST = 3
"""So many of a text's last tokens, at most, are looked for in it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Of all slots, or of a step's."""

    token_BS: Any
    """i32, a slot's text from its first token to its last, and a prediction at the end"""
    predicted_B: Any
    """i32, where the prediction's part begins; S = there is none"""

    @classmethod
    def empty(cls, slots: int, length: int) -> "Texts":
        """None there."""
        return cls(jnp.zeros((slots, length), jnp.int32), jnp.full((slots,), length, jnp.int32))

    def of(self, slot_N: jax.Array) -> "Texts":
        """Some slots'; a number that no slot has gets another's."""
        return jax.tree.map(lambda values_B: values_B.at[slot_N].get(mode="clip"), self)

    def stored(self, slot_N: jax.Array, texts: "Texts") -> "Texts":
        """Other texts in some slots; for a number that no slot has nothing is stored."""
        return jax.tree.map(lambda into, values: into.at[slot_N].set(values, mode="drop"), self, texts)

    def longer(self, slot_N: jax.Array, start_N: jax.Array, token_NW: jax.Array, count_N: jax.Array) -> "Texts":
        """With the first `count` of these tokens in the slots' texts, from `start` on; in place where it is donated.
        What would stand behind the end is dropped."""
        w_W = jnp.arange(token_NW.shape[1], dtype=jnp.int32)
        at_NW = jnp.where(w_W < count_N[:, None], start_N[:, None] + w_W, self.token_BS.shape[1])
        return Texts(self.token_BS.at[slot_N[:, None], at_NW].set(token_NW, mode="drop"), self.predicted_B)


def texts_of(openings: Sequence[Opening | None], length: int) -> Texts:
    """Of texts that go on, on the host; None's is empty."""
    token_NS = np.zeros((len(openings), length), np.int32)
    predicted_N = np.full(len(openings), length, np.int32)
    for n, opening in enumerate(openings):
        if opening is None:
            continue
        prompt_T = np.asarray(opening.text[: opening.prompt_length], np.int32)
        free = length - len(prompt_T) - LONGEST  # so that the prompt's last tokens stand before it
        predicted_T = np.asarray(opening.prediction, np.int32)[: max(0, free)]
        if len(predicted_T):
            predicted_T = np.concatenate([prompt_T[-(LONGEST - 1) :], predicted_T])
            predicted_N[n] = length - len(predicted_T)
            token_NS[n, predicted_N[n] :] = predicted_T
        text_T = np.asarray(opening.text, np.int32)
        token_NS[n, : len(text_T)] = text_T
    return Texts(token_NS, predicted_N)
