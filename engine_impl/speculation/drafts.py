"""Tokens that may come next, and which of them are what the model chose."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drafts(NamedTuple):
    """What stands, perhaps, behind the last tokens of a step's slots."""

    token_NW: jax.Array
    """i32, in order; without meaning from `count` on"""
    count_N: jax.Array
    """i32, how many there are, up to W"""

    @classmethod
    def none(cls, slots: int, width: int) -> "Drafts":
        """Nobody drafts."""
        return cls(jnp.zeros((slots, width), jnp.int32), jnp.zeros((slots,), jnp.int32))


class Accepted(NamedTuple):
    """What a step's choices say of its drafts."""

    agreed_N: jax.Array
    """i32, how many of the drafts, the leading ones, are what was chosen: up to W"""
    count_N: jax.Array
    """i32, how many of the choices are the slot's next tokens: up to W, and to its room"""


def accept(chosen_NW: jax.Array, drafts: Drafts, room_N: jax.Array) -> Accepted:
    """Choices hold as far as what they were made behind is right: the first one always, each other one behind a draft
    that is what was chosen in its place. Draft W was not taken in, and what stands behind it is not known.

    `room_N`: tokens that the slots may still get, 0 for one that is not live.
    """
    W = chosen_NW.shape[1]
    is_right_NW = (drafts.token_NW == chosen_NW) & (jnp.arange(W) < drafts.count_N[:, None])
    agreed_N = jnp.cumprod(is_right_NW.astype(jnp.int32), axis=1).sum(axis=1)
    return Accepted(agreed_N, jnp.minimum(jnp.minimum(agreed_N, W - 1) + 1, room_N))
