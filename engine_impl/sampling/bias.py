"""What is added to the logits of single tokens: a request's own bias, and minus infinity where an answer must go on."""

import jax
import jax.numpy as jnp

from .slots import NOWHERE, SlotSampling


def biased(logits_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """Logits, f32, with each slot's logit_bias."""
    return _added(logits_BV, *sampling.logit_bias)


def without_ends(logits_BV: jax.Array, sampling: SlotSampling, position_B: jax.Array) -> jax.Array:
    """Logits, f32: -inf for the tokens that would end an answer which has fewer than its min_tokens."""
    goes_on_B1 = sampling.must_go_on(position_B)[:, None]
    token_BK = jnp.where(goes_on_B1, sampling.stop_token_ids, NOWHERE)
    return _added(logits_BV, token_BK, jnp.full(token_BK.shape, -jnp.inf, jnp.float32))


def _added(logits_BV: jax.Array, token_BK: jax.Array, value_BK: jax.Array) -> jax.Array:
    """Ids beyond the vocabulary, NOWHERE among them, add nothing."""
    slot_B1 = jnp.arange(token_BK.shape[0])[:, None]
    return logits_BV.at[slot_B1, token_BK].add(value_BK, mode="drop")
