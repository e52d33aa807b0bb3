"""Allocation of the stacked cache, and insert: one of the two places where it changes (the other is the flush)."""

import jax
import jax.numpy as jnp

from .layout import CacheLayout


def allocate(layout: CacheLayout, mesh: jax.sharding.Mesh) -> jax.Array:
    """An empty cache_LBKSC, each device holding its own heads only."""
    empty = layout.abstract(mesh)
    return jax.jit(lambda: jnp.zeros(empty.shape, empty.dtype), out_shardings=empty.sharding)()


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
