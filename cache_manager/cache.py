"""Insert: one of the two places where the stacked cache changes (the other is the flush)."""

import jax
import jax.numpy as jnp


def insert(cache_LBKSC: jax.Array, prefix_LKTC: jax.Array, slot: jax.Array) -> jax.Array:
    """Write a prompt's rows to the front of a slot, in place when the cache is donated.

    Rows of the bucket past the prompt's length come along: they lie beyond the slot's length, where nobody reads.

    Raises ValueError when the bucket is longer than the cache.
    """
    bucket, cache_length = prefix_LKTC.shape[2], cache_LBKSC.shape[3]
    if bucket > cache_length:
        raise ValueError(f"{bucket=} does not fit into {cache_length=}; use a bucket of at most {cache_length}")
    zero = jnp.zeros_like(slot)
    return jax.lax.dynamic_update_slice(cache_LBKSC, prefix_LKTC[:, None], (zero, slot, zero, zero, zero))
