"""Sampling on the device, all slots in one program, each by its own parameters: bias, penalties, least length, the
grammar's mask, then greedy, or temperature, top-k, top-p, min-p and a seed.

A token depends on its logits, its request's parameters and its position in the text, never on the slot or on what else
is in the batch: the random key is folded from the request's seed and the position.

Nothing sorts the vocabulary (a full sort takes the TPU compiler 23 s). The smallest kept value is found by bisection
over the bits of a float, exactly, in 32 passes, for top-k when a slot asks for it and for top-p likewise. Tokens as
likely as the last one kept are kept too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .bias import biased, without_ends
from .mask import Mask
from .penalties import penalise
from .slots import SlotSampling

LEAST_P = 1e-30
"""What a top_p of 0 is: less than the likeliest token has, so that it alone is kept."""


def sample(
    logits_BV: jax.Array,
    counts: Callable[[], jax.Array],
    sampling: SlotSampling,
    position_B: jax.Array,
    mask: Mask,
) -> jax.Array:
    """Choose one token a slot; or several, where each of B is one of a slot's positions, side by side.

    Args:
        logits_BV: any float; float32 where a slot asks for more than the likeliest, whose order is the same.
        counts: gives count_BV, u16, what the slots' texts have so far, see penalties.py; of use when a slot asks for a
            penalty, and not before.
        sampling: [B] each.
        position_B: i32, where in the text the chosen token will stand.
        mask: which tokens may be chosen at a slot's first position.

    Returns:
        token_B, i32.
    """
    goes_on_B = sampling.must_go_on(position_B)

    def asked() -> jax.Array:
        wanted_BV = logits_BV.astype(jnp.float32)
        for asked_B, applied in (
            (sampling.is_biased, lambda wanted_BV: biased(wanted_BV, sampling)),
            (sampling.is_penalised, lambda wanted_BV: penalise(wanted_BV, counts(), sampling)),
            (goes_on_B, lambda wanted_BV: without_ends(wanted_BV, sampling, position_B)),
            (mask.is_asked_B, mask.applied),
        ):
            wanted_BV = jax.lax.cond(asked_B.any(), applied, lambda wanted_BV: wanted_BV, wanted_BV)
        likeliest_B = _argmax(wanted_BV)
        return jax.lax.cond(
            sampling.is_drawn.any(),
            lambda: jnp.where(sampling.is_drawn, _draw(wanted_BV, sampling, position_B), likeliest_B),
            lambda: likeliest_B,
        )

    likeliest_B = _argmax(logits_BV)
    is_asked_B = sampling.is_drawn | sampling.is_biased | sampling.is_penalised | goes_on_B
    return jax.lax.cond(is_asked_B.any() | mask.is_asked_B.any(), asked, lambda: likeliest_B)


def _argmax(values_BV: jax.Array) -> jax.Array:
    """i32. XLA:CPU computes an argmax one value at a time, 7.1 ms of CPU time for 32 slots of 49,152 tokens; the
    largest value and the first place that is not below it are two reductions by vectors, 1.0 ms."""

    def first_of_largest(values_BV):
        V = values_BV.shape[1]
        is_largest_BV = jnp.logical_not(values_BV < values_BV.max(axis=1, keepdims=True))
        return jnp.where(is_largest_BV, jnp.arange(V, dtype=jnp.int32)[None, :], V).min(axis=1)

    def argmax(values_BV):
        return jnp.argmax(values_BV, axis=1).astype(jnp.int32)

    return jax.lax.platform_dependent(values_BV, cpu=first_of_largest, default=argmax)


def _draw(logits_BV: jax.Array, sampling: SlotSampling, position_B: jax.Array) -> jax.Array:
    """Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax."""
    scaled_BV = logits_BV / jnp.maximum(sampling.temperature, 1e-6)[:, None]

    def noise_V(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (logits_BV.shape[1],))

    return _argmax(cut(scaled_BV, sampling) + jax.vmap(noise_V)(sampling.seed, position_B))


def cut(logits_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """Top-k, then top-p and min-p of what is left; the rest becomes -inf. `logits_BV` are f32, after temperature.

    Llama-3.1-8B, 96 slots on eight v5e: while some slot asks, top-k costs 1.1 and top-p 1.6 million static cycles
    beside the step's 9.0, and 32 all-reduces of [B] each; a draw 0.1, and min-p nothing more.
    """
    is_k_asked = (sampling.top_k > 0) & sampling.is_drawn
    is_p_asked = (sampling.top_p < 1) & sampling.is_drawn
    kept_BV = jax.lax.cond(is_k_asked.any(), lambda: _top_k(logits_BV, sampling.top_k), lambda: logits_BV)
    kept_BV = jax.lax.cond(is_p_asked.any(), lambda: _top_p(kept_BV, sampling.top_p), lambda: kept_BV)
    # The likeliest token is always kept, so a token's share of its probability is the same before and after a cut.
    least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
    return jnp.where(logits_BV >= least_B1, kept_BV, -jnp.inf)


def _top_k(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    order_BV = _ordered(logits_BV)
    k_B1 = jnp.where(top_k_B > 0, top_k_B, logits_BV.shape[1])[:, None]
    last_B1 = _largest(lambda t_B1: (order_BV >= t_B1).sum(-1, keepdims=True) >= k_B1, like=k_B1)
    return jnp.where(order_BV >= last_B1, logits_BV, -jnp.inf)


def _top_p(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    order_BV, p_BV = _ordered(logits_BV), jax.nn.softmax(logits_BV, axis=-1)
    top_p_B1 = jnp.maximum(top_p_B, LEAST_P)[:, None]
    last_B1 = _largest(
        lambda t_B1: jnp.where(order_BV >= t_B1, p_BV, 0).sum(-1, keepdims=True) >= top_p_B1, like=top_p_B1
    )
    return jnp.where((order_BV >= last_B1) | (top_p_B1 >= 1), logits_BV, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """Floats as u32 in the same order: flip all bits of a negative number, the sign bit of any other."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest u32 for which `holds` (true up to some value, then false), bit by bit from the top."""

    def set_bit(i, t):
        candidate = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, t)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(like.shape, jnp.uint32))
