"""Chunk attention in C++: kernels/native/chunk_attention.h."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import native


def chunk_attention_native(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    cache_LPKRC: jax.Array,
    scale_LPK2R: jax.Array | None,
    layer: jax.Array,
    start_M: jax.Array,
    count_M: jax.Array,
    page_MJ: jax.Array,
    window: jax.Array | None,
    sink_N: jax.Array | None,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """`op.chunk_attention` on one shard's heads; `layer` and `window` are i32 scalars, floats are f32.

    32 tokens of a kv head's queries are the parts that threads share, each over the rows that they see. All operands
    are read where they lie, the cache's pages too: XLA lays nothing out anew.
    """
    scale = jnp.zeros((0,), jnp.float32) if scale_LPK2R is None else scale_LPK2R
    seen = jnp.int32(0) if window is None else window
    sink = jnp.zeros((0,), jnp.float32) if sink_N is None else sink_N
    out_TNH = jax.ShapeDtypeStruct(q_TNH.shape, jnp.float32)
    operands = (q_TNH, k_TKH, v_TKH, cache_LPKRC, scale, layer, start_M, count_M, page_MJ, seen, sink)
    return native.call("slipstream_chunk_attention", out_TNH, *operands, soft_cap=np.float32(soft_cap or 0.0))
