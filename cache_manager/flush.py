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
    new_LBWKC: jax.Array,
    length_B: jax.Array,
    count_B: jax.Array,
    page_BJ: jax.Array,
    *,
    codec: Codec,
    mesh: jax.sharding.Mesh,
    backend: Backend,
) -> KV:
    """Store the first `count` of each slot's W new tokens behind its last row, for all layers at once; in place when
    donated.

    A dead slot has a count of 0 and is not written at all; nor are tokens for which its pages have no row.
    """
    new, where = codec.encode(new_LBWKC), (length_B, count_B, page_BJ)
    rows = cache_flush(cache.rows, new.rows, *where, mesh=mesh, backend=backend)
    if cache.scales is None or new.scales is None:
        return KV(rows)
    scales = cache_flush(cache.scales, new.scales, *where, row_axis=4, mesh=mesh, backend=backend)
    return KV(rows, scales)
