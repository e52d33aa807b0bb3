"""Flush in plain XLA: the definition, and what runs on CPU and GPU."""

import jax
import jax.numpy as jnp


def cache_flush_reference(cache: jax.Array, new: jax.Array, position_B: jax.Array, *, token_axis: int) -> jax.Array:
    """`op.cache_flush` on one shard's heads: a scatter with every leading axis indexed, which XLA does in place.

    Except for bf16 on CPU, where XLA computes updates in f32 and so converts the whole cache, there and back: use f32.
    """
    L, B, K = cache.shape[:3]
    S = cache.shape[token_axis]
    # Negative indices would count from the end: send them out of bounds, where "drop" drops.
    position_B = jnp.where((position_B >= 0) & (position_B < S), position_B, S)
    if token_axis == 3:
        l_L11, b_1B1, k_11K = jnp.ogrid[:L, :B, :K]
        places = cache.at[l_L11, b_1B1, k_11K, position_B[None, :, None]]
    else:
        leading = jnp.ogrid[:L, :B, :K, : cache.shape[3]]
        places = cache.at[(*leading, position_B[None, :, None, None])]
    return places.set(new, mode="drop", unique_indices=True)
