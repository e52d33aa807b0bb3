"""The step's new tokens: every layer returns its k and v, they wait side by side, and one flush stores them all."""

import jax
import jax.numpy as jnp

from ..kernels import Backend, cache_flush


def rows(k_RKH: jax.Array, v_RKH: jax.Array) -> jax.Array:
    """k and v as the cache's rows, new_RKC."""
    return jnp.concatenate([k_RKH, v_RKH], axis=-1)


def flush(
    cache_LBKSC: jax.Array,
    new_LBKC: jax.Array,
    length_B: jax.Array,
    live_B: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    backend: Backend,
) -> jax.Array:
    """Store every live slot's new token behind its last row, for all layers at once; in place when donated.

    A dead slot, and one that is full, is not written at all: its position is put outside the cache.
    """
    outside = cache_LBKSC.shape[3]
    return cache_flush(cache_LBKSC, new_LBKC, jnp.where(live_B, length_B, outside), mesh=mesh, backend=backend)
