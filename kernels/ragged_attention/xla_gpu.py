"""Decode attention in plain XLA, written so that XLA's GPU compiler reads the cache where it lies."""

import jax
import jax.numpy as jnp

from ..scores import cap_scores, rows_seen

BLOCK_BYTES = 128 * 2**20
"""Rows of all slots that one iteration reads (bytes): 40 us of an H100's bandwidth. An iteration also costs the launch
of a dozen kernels and a look of the host at the loop's condition, so few long ones are better than many short ones."""


def ragged_attention_gpu(
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
    """`op.ragged_attention` on one shard's heads, as the reference has it; `layer` and `window` are i32 scalars.

    What XLA's GPU compiler makes of a block of rows decides its form (docs/gpu-evidence.md has the numbers):

    - Layers and slots are one axis, so that a slice has no axis of size 1. With one, and as many kv heads as query
      heads, the compiler finds a layout for the slice that makes it transpose the whole cache, at every step.
    - Products are multiplied and summed, not dots. A dot wants its operand in memory: a block that is sliced and masked
      for it would be written and read again. A sum reads rows, mask and all, straight from the cache.
    - k and v are read apart, each once: sums take the half of a row that they want. The heads of a group follow one
      another in the scores' last axis, so that a row is still in the L1 cache for the next of them; over v there is a
      sum a head, which the compiler joins.
    """
    (B, N, H), (L, _, K, S, C) = q_BNH.shape, cache_LBKSC.shape
    G, block = N // K, rows_a_block(B * K * C * cache_LBKSC.dtype.itemsize, S)
    layers_KSC = cache_LBKSC.reshape(L * B, K, S, C)
    q_BKGH = q_BNH.reshape(B, K, G, H).astype(jnp.float32) * H**-0.5
    new_BKC = new_BKC.astype(jnp.float32)
    m_BKG = cap_scores((q_BKGH * new_BKC[:, :, None, :H]).sum(-1), soft_cap)
    l_BKG = jnp.ones_like(m_BKG)
    acc_BKGH = jnp.broadcast_to(new_BKC[:, :, None, H:], q_BKGH.shape)
    first_B, end_B = rows_seen(length_B, window)
    first_B = jnp.broadcast_to(first_B, end_B.shape)

    def add_block(index, carry):
        m_BKG, l_BKG, acc_BKGH = carry
        start = index * block
        row_S = start + jnp.arange(block)
        live_BS = (row_S[None, :] >= first_B[:, None]) & (row_S[None, :] < end_B[:, None])

        def half(lane):
            corner = (layer * B, jnp.int32(0), start, jnp.int32(lane))
            return jax.lax.dynamic_slice(layers_KSC, corner, (B, K, block, H)).astype(jnp.float32)

        score_BKSG = (half(0)[:, :, :, None] * q_BKGH[:, :, None]).sum(-1)
        scale_BK2S = None
        if scale_LBK2S is not None:
            corner = (layer * B, jnp.int32(0), jnp.int32(0), start)
            scale_BK2S = jax.lax.dynamic_slice(scale_LBK2S.reshape(L * B, K, 2, S), corner, (B, K, 2, block))
            scale_BK2S = jnp.where(live_BS[:, None, None], scale_BK2S, 0)
            score_BKSG = score_BKSG * scale_BK2S[:, :, 0, :, None]
        score_BKSG = jnp.where(live_BS[:, None, :, None], cap_scores(score_BKSG, soft_cap), -jnp.inf)
        m_next_BKG = jnp.maximum(m_BKG, score_BKSG.max(axis=2))
        p_BKSG = jnp.exp(score_BKSG - m_next_BKG[:, :, None])
        decay_BKG = jnp.exp(m_BKG - m_next_BKG)
        l_BKG = l_BKG * decay_BKG + p_BKSG.sum(axis=2)
        weight_BKSG = p_BKSG if scale_BK2S is None else p_BKSG * scale_BK2S[:, :, 1, :, None]
        # Dead rows may hold NaN, and 0 * NaN is NaN: masking the scores alone is not enough.
        v_BKSH = jnp.where(live_BS[:, None, :, None], half(H), 0)
        seen_BKGH = jnp.stack([(v_BKSH * weight_BKSG[..., g, None]).sum(2) for g in range(G)], axis=2)
        return m_next_BKG, l_BKG, acc_BKGH * decay_BKG[..., None] + seen_BKGH

    first_block = jnp.min(first_B, where=end_B > 0, initial=S) // block
    end_block = (jnp.clip(end_B.max(), 0, S) + block - 1) // block
    _, l_BKG, acc_BKGH = jax.lax.fori_loop(first_block, end_block, add_block, (m_BKG, l_BKG, acc_BKGH))
    return (acc_BKGH / l_BKG[..., None]).reshape(B, N, H).astype(q_BNH.dtype)


def rows_a_block(row_bytes: int, cache_length: int) -> int:
    """The most rows, a divisor of the cache length (a multiple of 128), whose bytes of all slots keep to BLOCK_BYTES;
    at least 128."""
    tiles = cache_length // 128
    most = max(1, BLOCK_BYTES // (128 * row_bytes))
    return 128 * max(part for part in range(1, tiles + 1) if tiles % part == 0 and part <= most)
