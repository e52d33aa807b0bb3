"""Decode attention in plain XLA, written so that XLA's GPU compiler reads the cache where it lies."""

import jax
import jax.numpy as jnp

from ..scores import cap_scores, rows_seen

BLOCK_BYTES, BLOCK_ROWS = 128 * 2**20, 1024
"""What one turn of the loop reads at most: bytes of all slots' rows, and rows of a slot. A turn costs a dozen kernels
and a look of the host at the loop's condition beside them, so short ones waste time; but half of the last one is dead
rows. Microseconds a layer on an H100 in a CUDA graph, four heads a group, 8 slots of 256 and of 4000 tokens: turns of
1024 rows 169, 324; of 2048 254, 297; of 4096 372, 359."""


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
    - k and v are read apart: sums take the half of a row that they want. Each query head of a group has a sum of its
      own, and a barrier behind them, so that the compiler joins them: a row that was read serves several heads. One sum
      with an axis of heads read it again for each, and was bound by that: twice the time with four heads.
    - The layer's number is made unknown. A constant would give every layer kernels of its own to compile.
    """
    (B, N, H), (L, _, K, S, C) = q_BNH.shape, cache_LBKSC.shape
    G, block = N // K, rows_a_block(B * K * C * cache_LBKSC.dtype.itemsize, S)
    layer = jax.lax.optimization_barrier(layer)
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
        start = jnp.minimum(index * block, S - block)  # the last block may reach back into the one before
        row_S = start + jnp.arange(block)
        live_BS = (row_S[None, :] >= first_B[:, None]) & (row_S[None, :] < end_B[:, None])
        live_BS = live_BS & (row_S >= index * block)[None, :]

        def half(lane):
            corner = (layer * B, jnp.int32(0), start, jnp.int32(lane))
            return jax.lax.dynamic_slice(layers_KSC, corner, (B, K, block, H)).astype(jnp.float32)

        k_BKSH = half(0)
        score_BKGS = _joined([(k_BKSH * q_BKGH[:, :, g, None]).sum(-1) for g in range(G)])
        scale_BK2S = None
        if scale_LBK2S is not None:
            corner = (layer * B, jnp.int32(0), jnp.int32(0), start)
            scale_BK2S = jax.lax.dynamic_slice(scale_LBK2S.reshape(L * B, K, 2, S), corner, (B, K, 2, block))
            scale_BK2S = jnp.where(live_BS[:, None, None], scale_BK2S, 0)
            score_BKGS = score_BKGS * scale_BK2S[:, :, :1]
        score_BKGS = jnp.where(live_BS[:, None, None], cap_scores(score_BKGS, soft_cap), -jnp.inf)
        m_next_BKG = jnp.maximum(m_BKG, score_BKGS.max(axis=-1))
        p_BKGS = jnp.exp(score_BKGS - m_next_BKG[..., None])
        decay_BKG = jnp.exp(m_BKG - m_next_BKG)
        l_BKG = l_BKG * decay_BKG + p_BKGS.sum(axis=-1)
        weight_BKGS = p_BKGS if scale_BK2S is None else p_BKGS * scale_BK2S[:, :, 1:]
        # Dead rows may hold NaN, and 0 * NaN is NaN: masking the scores alone is not enough.
        v_BKSH = jnp.where(live_BS[:, None, :, None], half(H), 0)
        seen_BKGH = _joined([(v_BKSH * weight_BKGS[:, :, g, :, None]).sum(2) for g in range(G)])
        return m_next_BKG, l_BKG, acc_BKGH * decay_BKG[..., None] + seen_BKGH

    first_block = jnp.min(first_B, where=end_B > 0, initial=S) // block
    end_block = (jnp.clip(end_B.max(), 0, S) + block - 1) // block
    _, l_BKG, acc_BKGH = jax.lax.fori_loop(first_block, end_block, add_block, (m_BKG, l_BKG, acc_BKGH))
    return (acc_BKGH / l_BKG[..., None]).reshape(B, N, H).astype(q_BNH.dtype)


def _joined(of_heads: list[jax.Array]) -> jax.Array:
    """The arrays of a group's heads along axis 2, none of them fused with what takes them."""
    return jnp.stack(jax.lax.optimization_barrier(of_heads), axis=2)


def rows_a_block(row_bytes: int, cache_length: int) -> int:
    """The most rows, a multiple of 128, that keep to BLOCK_BYTES and BLOCK_ROWS; at least 128, at most all.

    `row_bytes` is one row of all slots and heads.
    """
    tiles = min(BLOCK_BYTES // (128 * row_bytes), BLOCK_ROWS // 128, cache_length // 128)
    return 128 * max(tiles, 1)
