"""The step's new tokens: every layer returns its k and v, they wait side by side, and one flush stores them all."""

import jax
import jax.numpy as jnp

from ..kernels import Backend, cache_flush
from .codec import KV, Codec


def rows(k_RKH: jax.Array, v_RKH: jax.Array) -> jax.Array:
    """k and v as the cache's rows, new_RKC."""
    return jnp.concatenate([k_RKH, v_RKH], axis=-1)


def flush(
    cache: KV,
    new_LBKC: jax.Array,
    length_B: jax.Array,
    live_B: jax.Array,
    page_BJ: jax.Array,
    *,
    codec: Codec,
    mesh: jax.sharding.Mesh,
    backend: Backend,
) -> KV:
    """Store every live slot's new token behind its last row, for all layers at once; in place when donated.

    A dead slot, and one whose pages are full, is not written at all: its position is put outside.
    """
    position_B, new = jnp.where(live_B, length_B, -1), codec.encode(new_LBKC)
    rows = cache_flush(cache.rows, new.rows, position_B, page_BJ, mesh=mesh, backend=backend)
    if cache.scales is None or new.scales is None:
        return KV(rows)
    scales = cache_flush(cache.scales, new.scales, position_B, page_BJ, row_axis=4, mesh=mesh, backend=backend)
    return KV(rows, scales)
