"""Decode attention in plain XLA: the definition, and what runs on CPUs without native kernels."""

import jax
import jax.numpy as jnp

from ..scores import cap_scores, rows_seen
from .own_rows import attend_own, by_kv_head, by_token, first_seen


def ragged_attention_reference(
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
    """`op.ragged_attention` on one shard's heads; `layer` and `window` are i32 scalars.

    Slot after slot, an online softmax over the slot's pages that starts from its new tokens. The loop goes from the
    first page that the slot sees to its last, so that a slot costs its own rows, whatever the others hold. Accumulates
    in f32.

    k and v are not cut apart, which would copy them: q padded with zeros makes q . row = q . k, and of p @ row the last
    H lanes are p @ v. Use f32 on CPUs: XLA:CPU slices bf16 by way of an f32 copy of the whole cache.
    """
    (B, W, N, H), (K, R, C), J = q_BWNH.shape, cache_LPKRC.shape[2:], page_BJ.shape[1]
    q_BKXH = by_kv_head(q_BWNH.astype(jnp.float32) * H**-0.5, K)
    q_BKXC = jnp.pad(q_BKXH, ((0, 0), (0, 0), (0, 0), (0, C - H)))
    token_X = jnp.arange(W * N // K) // (N // K)
    m_BKX, l_BKX, acc_BKXH = attend_own(q_BKXH, new_BWKC.swapaxes(1, 2).astype(jnp.float32), window, soft_cap, sink_N)
    acc_BKXC = jnp.pad(acc_BKXH, ((0, 0), (0, 0), (0, 0), (C - H, 0)))
    first_B, end_B = rows_seen(length_B, window)
    first_B, end_B = jnp.broadcast_to(first_B, end_B.shape), jnp.minimum(end_B, J * R)

    def attend_slot(slot, out_BKXC):
        q_KXC, first, end = q_BKXC[slot], first_B[slot], end_B[slot]

        def add_page(block, carry):
            m_KX, l_KX, acc_KXC = carry
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
            score_KRX = jax.lax.optimization_barrier(jnp.einsum("KRC,KXC->KRX", rows_KRC, q_KXC))
            score_KXR = cap_scores(score_KRX.swapaxes(1, 2) * scale_K2R[:, :1], soft_cap)
            is_seen_XR = live_R[None, :]
            if window is not None and W > 1:
                is_seen_XR = is_seen_XR & (row_R[None, :] >= first_seen(length_B[slot], window, token_X)[:, None])
            score_KXR = jnp.where(is_seen_XR[None], score_KXR, -jnp.inf)
            m_next_KX = jnp.maximum(m_KX, score_KXR.max(axis=-1))
            p_KXR = jnp.exp(score_KXR - m_next_KX[..., None])
            decay_KX = jnp.exp(m_KX - m_next_KX)
            l_KX = l_KX * decay_KX + p_KXR.sum(axis=-1)
            seen_KXC = jnp.einsum("KXR,KRC->KXC", p_KXR * scale_K2R[:, 1:], rows_KRC)
            return m_next_KX, l_KX, acc_KXC * decay_KX[..., None] + seen_KXC

        _, l_KX, acc_KXC = jax.lax.fori_loop(
            first // R, (end + R - 1) // R, add_page, (m_BKX[slot], l_BKX[slot], acc_BKXC[slot])
        )
        return jax.lax.dynamic_update_index_in_dim(out_BKXC, acc_KXC / l_KX[..., None], slot, 0)

    out_BKXC = jax.lax.fori_loop(0, B, attend_slot, jnp.zeros_like(acc_BKXC))
    return by_token(out_BKXC[..., H:], W).astype(q_BWNH.dtype)
