"""Flush in plain XLA: the definition, and what runs on CPU and GPU."""

import jax
import jax.numpy as jnp


def cache_flush_reference(
    cache: jax.Array,
    new: jax.Array,
    position_B: jax.Array,
    count_B: jax.Array,
    page_BJ: jax.Array,
    *,
    row_axis: int,
) -> jax.Array:
    """`op.cache_flush` on one shard's heads.

    A scatter with every leading axis indexed, which XLA does in place. Except for bf16 on CPU, where XLA computes
    updates in f32 and so converts the whole cache, there and back: use f32.
    """
    (L, _, K), W, R, J = cache.shape[:3], new.shape[2], cache.shape[row_axis], page_BJ.shape[1]
    token_W = jnp.arange(W, dtype=jnp.int32)[None, :]
    position_BW = position_B[:, None] + token_W
    is_stored_BW = (token_W < count_B[:, None]) & (position_BW >= 0) & (position_BW < J * R)
    # Negative indices would count from the end: send what is not stored out of bounds, where "drop" drops.
    row_BW = jnp.where(is_stored_BW, position_BW % R, R)
    page_BW = jnp.take_along_axis(page_BJ, jnp.clip(position_BW // R, 0, J - 1), axis=1)
    if row_axis == 3:
        l_L111, _, _, k_111K = jnp.ogrid[:L, :1, :1, :K]
        places = cache.at[l_L111, page_BW[None, :, :, None], k_111K, row_BW[None, :, :, None]]
    else:
        l_L1111, _, _, k_111K1, both_11112 = jnp.ogrid[:L, :1, :1, :K, : cache.shape[3]]
        page_1BW11, row_1BW11 = page_BW[None, :, :, None, None], row_BW[None, :, :, None, None]
        places = cache.at[l_L1111, page_1BW11, k_111K1, both_11112, row_1BW11]
    return places.set(new, mode="drop", unique_indices=True)
