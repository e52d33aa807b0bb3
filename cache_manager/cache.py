"""Insert: one of the two places where the stacked cache changes (the other is the flush)."""

import jax
import jax.numpy as jnp

from .codec import KV, Codec
from .new_tokens import rows


def prompt_rows(k_TKH: jax.Array, v_TKH: jax.Array, codec: Codec) -> KV:
    """A layer's share of what `insert` takes: a prompt's rows_KTC, and their scales_K2T if the codec has any.

    Encoded here, once, and not at every insert: a prefix that waits, or serves several slots, is as small as its rows
    in the cache, and insert writes what it is given.
    """
    kv = codec.encode(rows(k_TKH, v_TKH))
    return KV(kv.rows.swapaxes(0, 1), None if kv.scales is None else kv.scales.transpose(1, 2, 0))


def insert(cache: KV, prefix: KV, slot: jax.Array) -> KV:
    """Write a prompt's rows (LKTC, scales LK2T) to the front of a slot, in place when the cache is donated.

    Rows of the bucket past the prompt's length come along: they lie beyond the slot's length, where nobody reads.

    Raises ValueError when the bucket is longer than the cache.
    """
    bucket, cache_length = prefix.rows.shape[2], cache.rows.shape[3]
    if bucket > cache_length:
        raise ValueError(f"{bucket=} does not fit into {cache_length=}; use a bucket of at most {cache_length}")
    zero = jnp.zeros_like(slot)

    def write(of_cache: jax.Array, of_prefix: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(of_cache, of_prefix[:, None], (zero, slot, zero, zero, zero))

    return jax.tree.map(write, cache, prefix)
