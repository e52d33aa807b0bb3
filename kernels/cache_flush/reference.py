"""Flush in plain XLA: the definition, and what runs on CPU and GPU."""

import jax
import jax.numpy as jnp


def cache_flush_reference(cache_LBKSC: jax.Array, new_LBKC: jax.Array, position_B: jax.Array) -> jax.Array:
    """`op.cache_flush` on one shard's heads: a scatter with every leading axis indexed, which XLA does in place.

    Except for bf16 on CPU, where XLA computes updates in f32 and so converts the whole cache, there and back: use f32.
    """
    L, B, K, S, _ = cache_LBKSC.shape
    # Negative indices would count from the end: send them out of bounds, where "drop" drops.
    position_B = jnp.where((position_B >= 0) & (position_B < S), position_B, S)
    l_L11, b_1B1, k_11K = jnp.ogrid[:L, :B, :K]
    rows = cache_LBKSC.at[l_L11, b_1B1, k_11K, position_B[None, :, None]]
    return rows.set(new_LBKC, mode="drop", unique_indices=True)
