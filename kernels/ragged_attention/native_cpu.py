"""Decode attention in C++: kernels/native/ragged_attention.h."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import native


def ragged_attention_native(
    q_BWNH: jax.Array,
    new_BWKC: jax.Array,
    cache_LPKRC: jax.Array,
    scale_LPK2R: jax.Array | None,
    layer: jax.Array,
    length_B: jax.Array,
    page_BJ: jax.Array,
    window: jax.Array | None,
    sink_N: jax.Array | None,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """`op.ragged_attention` on one shard's heads; `layer` and `window` are i32 scalars, floats are f32.

    A slot's kv heads are the parts that threads share: each is read to its own length, page by page, and a page's
    scores and weights stay in the nearest cache. All W tokens share one read of a page, and so do up to four slots
    whose texts begin with it; a slot's result has the same bits either way.
    """
    scale = jnp.zeros((0,), jnp.float32) if scale_LPK2R is None else scale_LPK2R
    seen = jnp.int32(0) if window is None else window
    sink = jnp.zeros((0,), jnp.float32) if sink_N is None else sink_N
    out_BWNH = jax.ShapeDtypeStruct(q_BWNH.shape, jnp.float32)
    operands = (q_BWNH, new_BWKC, cache_LPKRC, scale, layer, length_B, page_BJ, seen, sink)
    return native.call("slipstream_ragged_attention", out_BWNH, *operands, soft_cap=np.float32(soft_cap or 0.0))
