"""Decode attention in plain XLA: the definition, and what runs on CPUs without native kernels."""

import jax
import jax.numpy as jnp

from ..scores import add_sink, cap_scores, rows_seen


def ragged_attention_reference(
    q_BNH: jax.Array,
    new_BKC: jax.Array,
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
    """`op.ragged_attention` on one shard's heads; `layer` and `window` are i32 scalars.

    Slot after slot, an online softmax over the slot's pages that starts from its new token. The loop goes from the
    first page that the slot sees to its last, so that a slot costs its own rows, whatever the others hold. Accumulates
    in f32.

    k and v are not cut apart, which would copy them: q padded with zeros makes q . row = q . k, and of p @ row the last
    H lanes are p @ v. Use f32 on CPUs: XLA:CPU slices bf16 by way of an f32 copy of the whole cache.
    """
    (B, N, H), (K, R, C), J = q_BNH.shape, cache_LPKRC.shape[2:], page_BJ.shape[1]
    q_BKGH = q_BNH.reshape(B, K, N // K, H).astype(jnp.float32) * H**-0.5
    q_BKGC = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, 0), (0, C - H)))
    new_BKC = new_BKC.astype(jnp.float32)
    m_BKG = cap_scores(jnp.einsum("BKGC,BKC->BKG", q_BKGC, new_BKC), soft_cap)
    l_BKG = jnp.ones_like(m_BKG)
    acc_BKGC = jnp.broadcast_to(new_BKC[:, :, None], q_BKGC.shape)
    sink_KG = None if sink_N is None else sink_N.reshape(K, N // K)
    m_BKG, l_BKG, acc_BKGC = add_sink(m_BKG, l_BKG, acc_BKGC, sink_KG)
    first_B, end_B = rows_seen(length_B, window)
    first_B, end_B = jnp.broadcast_to(first_B, end_B.shape), jnp.minimum(end_B, J * R)

    def attend_slot(slot, out_BKGC):
        q_KGC, first, end = q_BKGC[slot], first_B[slot], end_B[slot]

        def add_page(block, carry):
            m_KG, l_KG, acc_KGC = carry
            row_R = block * R + jnp.arange(R)
            live_R = (row_R >= first) & (row_R < end)
            start = (layer, page_BJ[slot, block], jnp.int32(0), jnp.int32(0), jnp.int32(0))
            rows_KRC = jax.lax.dynamic_slice(cache_LPKRC, start, (1, 1, K, R, C))[0, 0]
            # Dead rows may hold NaN, and 0 * NaN is NaN: masking the scores alone is not enough.
            rows_KRC = jnp.where(live_R[None, :, None], rows_KRC, 0).astype(jnp.float32)
            scale_K2R = jnp.ones((1, 2, 1))
            if scale_LPK2R is not None:
                scale_K2R = jax.lax.dynamic_slice(scale_LPK2R, start, (1, 1, K, 2, R))[0, 0]
                scale_K2R = jnp.where(live_R[None, None, :], scale_K2R, 0)

            # Rows first, and the barrier keeps it so: XLA:CPU turns the second operand around, and q is the small one.
            score_KRG = jax.lax.optimization_barrier(jnp.einsum("KRC,KGC->KRG", rows_KRC, q_KGC))
            score_KGR = score_KRG.swapaxes(1, 2) * scale_K2R[:, :1]
            score_KGR = jnp.where(live_R[None, None, :], cap_scores(score_KGR, soft_cap), -jnp.inf)
            m_next_KG = jnp.maximum(m_KG, score_KGR.max(axis=-1))
            p_KGR = jnp.exp(score_KGR - m_next_KG[..., None])
            decay_KG = jnp.exp(m_KG - m_next_KG)
            l_KG = l_KG * decay_KG + p_KGR.sum(axis=-1)
            seen_KGC = jnp.einsum("KGR,KRC->KGC", p_KGR * scale_K2R[:, 1:], rows_KRC)
            return m_next_KG, l_KG, acc_KGC * decay_KG[..., None] + seen_KGC

        _, l_KG, acc_KGC = jax.lax.fori_loop(
            first // R, (end + R - 1) // R, add_page, (m_BKG[slot], l_BKG[slot], acc_BKGC[slot])
        )
        return jax.lax.dynamic_update_index_in_dim(out_BKGC, acc_KGC / l_KG[..., None], slot, 0)

    out_BKGC = jax.lax.fori_loop(0, B, attend_slot, jnp.zeros_like(acc_BKGC))
    return out_BKGC[..., H:].reshape(B, N, H).astype(q_BNH.dtype)
