"""Drafts from the text itself: what followed its last tokens where they stood before.

All of it is arithmetic on the devices, within the step: the next one looks for tokens that this one chooses, which the
host knows one step later. So the loop stays one step ahead, whatever the width.
"""

import jax
import jax.numpy as jnp

from .drafts import Drafts
from .texts import LONGEST, Texts

SHORTEST = 2
"""So many of the last tokens, at least, must stand there."""


def look_up(texts: Texts, length_N: jax.Array, width: int, shortest: int = SHORTEST) -> Drafts:
    """Up to W drafts for each text, whose last token is number `length`.

    Of the places where most of the last LONGEST tokens stand the last one counts, which may be in the prediction. What
    follows it in the text is repeated where the text ends; a prediction ends as it is.
    """
    token_NS, S = texts.token_BS, texts.token_BS.shape[1]
    place_S, last_N1 = jnp.arange(S, dtype=jnp.int32), length_N[:, None]
    is_own_NS, is_predicted_NS = place_S < last_N1, (place_S > last_N1) & (place_S + 1 < S)
    found_NS, is_same_NS = jnp.zeros(token_NS.shape, jnp.int32), jnp.bool(True)
    for n in range(LONGEST):
        back_N1 = jnp.take_along_axis(token_NS, jnp.maximum(last_N1 - n, 0), axis=1)
        first_S = place_S - n
        is_there_NS = is_own_NS & (first_S >= 0)
        is_there_NS |= is_predicted_NS & (first_S >= texts.predicted_B[:, None]) & (first_S > last_N1)
        is_same_NS &= is_there_NS & (jnp.roll(token_NS, n, axis=1) == back_N1)
        found_NS += is_same_NS
    best_N1 = jnp.where(found_NS >= shortest, found_NS * S + place_S, -1).max(axis=1, keepdims=True)
    at_N1 = best_N1 % S
    w_W = jnp.arange(width, dtype=jnp.int32)
    follows_NW = at_N1 + 1 + jnp.where(at_N1 < last_N1, w_W % jnp.maximum(last_N1 - at_N1, 1), w_W)
    token_NW = jnp.take_along_axis(token_NS, jnp.minimum(follows_NW, S - 1), axis=1)
    count_N1 = jnp.where(at_N1 < last_N1, width, jnp.minimum(width, S - 1 - at_N1))
    return Drafts(token_NW, jnp.where(best_N1 >= 0, count_N1, 0)[:, 0])
