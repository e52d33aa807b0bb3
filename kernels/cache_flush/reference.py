"""Flush in plain XLA: the definition, and what runs on CPU and GPU."""

import jax
import jax.numpy as jnp


def cache_flush_reference(
    cache: jax.Array, new: jax.Array, page_B: jax.Array, row_B: jax.Array, *, row_axis: int
) -> jax.Array:
    """`op.cache_flush` on one shard's heads: new[:, b] goes to row row_B[b] of page page_B[b]; row -1 writes nothing.

    A scatter with every leading axis indexed, which XLA does in place. Except for bf16 on CPU, where XLA computes
    updates in f32 and so converts the whole cache, there and back: use f32.
    """
    L, _, K = cache.shape[:3]
    # Negative indices would count from the end: send them out of bounds, where "drop" drops.
    row_B = jnp.where(row_B >= 0, row_B, cache.shape[row_axis])
    if row_axis == 3:
        l_L11, _, k_11K = jnp.ogrid[:L, :1, :K]
        places = cache.at[l_L11, page_B[None, :, None], k_11K, row_B[None, :, None]]
    else:
        l_L111, _, k_11K1, both_1112 = jnp.ogrid[:L, :1, :K, : cache.shape[3]]
        places = cache.at[l_L111, page_B[None, :, None, None], k_11K1, both_1112, row_B[None, :, None, None]]
    return places.set(new, mode="drop", unique_indices=True)
