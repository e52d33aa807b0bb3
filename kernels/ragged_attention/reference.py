"""Decode attention in plain XLA: the definition, and what runs on CPUs."""

import jax
import jax.numpy as jnp

from ..scores import cap_scores, rows_seen

BLOCK = 64
"""Rows of the cache per loop iteration. A whole step of the embedded model on 2 CPU cores with 64 / 128 / 256 rows, in
turns: 39 / 38 / 38 ms (8 slots of 160 tokens), 102 / 105 / 99 ms (32 of 160), 93 / 89 / 91 ms (8 of 900)."""


def ragged_attention_reference(
    q_BNH: jax.Array,
    new_BKC: jax.Array,
    cache_LBKSC: jax.Array,
    scale_LBK2S: jax.Array | None,
    layer: jax.Array,
    length_B: jax.Array,
    window: jax.Array | None,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """`op.ragged_attention` on one shard's heads; `layer` and `window` are i32 scalars.

    An online softmax over blocks of rows that starts from the new token. The loop goes from the first row that any slot
    sees to the longest slot's last, so that neither rows outside nor other layers are read. Accumulates in f32.

    k and v are not cut apart, which would copy them: q padded with zeros makes q . row = q . k, and of p @ row the last
    H lanes are p @ v. SmolLM2-135M's 30 layers on 2 CPU cores, 8 slots, S = 1024, lengths ~200, f32: 11 ms a step;
    cut apart 23, over all S rows without a loop 177. Use f32 there: XLA:CPU slices bf16 by way of an f32 copy of the
    whole cache.
    """
    (B, N, H), (K, S, C) = q_BNH.shape, cache_LBKSC.shape[2:]
    q_BKGH = q_BNH.reshape(B, K, N // K, H).astype(jnp.float32) * H**-0.5
    q_BKGC = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, 0), (0, C - H)))
    new_BKC = new_BKC.astype(jnp.float32)
    m_BKG = cap_scores(jnp.einsum("BKGC,BKC->BKG", q_BKGC, new_BKC), soft_cap)
    l_BKG = jnp.ones_like(m_BKG)
    acc_BKGC = jnp.broadcast_to(new_BKC[:, :, None], q_BKGC.shape)
    first_B, end_B = rows_seen(length_B, window)
    first_B = jnp.broadcast_to(first_B, end_B.shape)

    def add_block(block, carry):
        m_BKG, l_BKG, acc_BKGC = carry
        row_S = block * BLOCK + jnp.arange(BLOCK)
        live_BS = (row_S[None, :] >= first_B[:, None]) & (row_S[None, :] < end_B[:, None])
        start = (layer, jnp.int32(0), jnp.int32(0), block * BLOCK, jnp.int32(0))
        rows_BKSC = jax.lax.dynamic_slice(cache_LBKSC, start, (1, B, K, BLOCK, C))[0]
        # Dead rows may hold NaN, and 0 * NaN is NaN: masking the scores alone is not enough.
        rows_BKSC = jnp.where(live_BS[:, None, :, None], rows_BKSC, 0).astype(jnp.float32)
        scale_BK2S = jnp.ones((1, 1, 2, 1))
        if scale_LBK2S is not None:
            start = (layer, jnp.int32(0), jnp.int32(0), jnp.int32(0), block * BLOCK)
            scale_BK2S = jax.lax.dynamic_slice(scale_LBK2S, start, (1, B, K, 2, BLOCK))[0]
            scale_BK2S = jnp.where(live_BS[:, None, None, :], scale_BK2S, 0)

        # Rows first, and the barrier keeps it so: XLA:CPU turns the second operand around, and q is the small one.
        score_BKSG = jax.lax.optimization_barrier(jnp.einsum("BKSC,BKGC->BKSG", rows_BKSC, q_BKGC))
        score_BKGS = score_BKSG.swapaxes(2, 3) * scale_BK2S[:, :, :1]
        score_BKGS = jnp.where(live_BS[:, None, None, :], cap_scores(score_BKGS, soft_cap), -jnp.inf)
        m_next_BKG = jnp.maximum(m_BKG, score_BKGS.max(axis=-1))
        p_BKGS = jnp.exp(score_BKGS - m_next_BKG[..., None])
        decay_BKG = jnp.exp(m_BKG - m_next_BKG)
        l_BKG = l_BKG * decay_BKG + p_BKGS.sum(axis=-1)
        weight_BKGS = p_BKGS * scale_BK2S[:, :, 1:]
        acc_BKGC = acc_BKGC * decay_BKG[..., None] + jnp.einsum("BKGS,BKSC->BKGC", weight_BKGS, rows_BKSC)
        return m_next_BKG, l_BKG, acc_BKGC

    first_block = jnp.min(first_B, where=end_B > 0, initial=S) // BLOCK
    end_block = (jnp.clip(end_B.max(), 0, S) + BLOCK - 1) // BLOCK
    _, l_BKG, acc_BKGC = jax.lax.fori_loop(first_block, end_block, add_block, (m_BKG, l_BKG, acc_BKGC))
    return (acc_BKGC[..., H:] / l_BKG[..., None]).reshape(B, N, H).astype(q_BNH.dtype)
