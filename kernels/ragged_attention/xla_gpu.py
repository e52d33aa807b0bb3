"""Decode attention in plain XLA, written so that XLA's GPU compiler reads the cache where it lies."""

import jax
import jax.numpy as jnp

from ..scores import cap_scores, rows_seen
from .own_rows import attend_own, by_kv_head, by_token, first_seen

BLOCK_BYTES, BLOCK_ROWS = 128 * 2**20, 1024
"""What one turn of the loop reads at most: bytes of all slots' rows, and rows of a slot. A turn costs a dozen kernels
and a look of the host at the loop's condition beside them, so short ones waste time; but half of the last one is dead
rows. Microseconds a layer on an H100 in a CUDA graph, four heads a group, 8 slots of 256 and of 4000 tokens: turns of
1024 rows 169, 324; of 2048 254, 297; of 4096 372, 359."""


def ragged_attention_gpu(
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
    """`op.ragged_attention` on one shard's heads, as the reference has it; `layer` and `window` are i32 scalars.

    What XLA's GPU compiler makes of a block of pages decides its form (docs/gpu-evidence.md has the numbers):

    - Layers and pages are one axis, so that what is gathered has no axis of size 1. A slice with one, and as many kv
      heads as query heads, made the compiler transpose the whole cache, at every step.
    - Products are multiplied and summed, not dots. A dot wants its operand in memory: a block that is gathered and
      masked for it would be written and read again. A sum reads rows, mask and all, straight from the cache.
    - k and v are read apart: sums take the half of a row that they want. Each query of a kv head has a sum of its own,
      and a barrier behind them, so that the compiler joins them: a row that was read serves several. One sum with an
      axis of queries read it again for each, and was bound by that: twice the time with four heads.
    - The layer's number is made unknown. A constant would give every layer kernels of its own to compile.
    """
    (B, W, N, H), (L, pool, K, R, C), J = q_BWNH.shape, cache_LPKRC.shape, page_BJ.shape[1]
    X, pages = W * N // K, pages_a_block(B * R * K * C * cache_LPKRC.dtype.itemsize, R, J)
    layer = jax.lax.optimization_barrier(layer)
    pages_KRC = cache_LPKRC.reshape(L * pool, K, R, C)
    q_BKXH = by_kv_head(q_BWNH.astype(jnp.float32) * H**-0.5, K)
    m_BKX, l_BKX, acc_BKXH = attend_own(q_BKXH, new_BWKC.swapaxes(1, 2).astype(jnp.float32), window, soft_cap, sink_N)
    token_1X = (jnp.arange(X) // (X // W))[None, :]
    first_B, end_B = rows_seen(length_B, window)
    first_B, end_B = jnp.broadcast_to(first_B, end_B.shape), jnp.minimum(end_B, J * R)

    def add_block(index, carry):
        m_BKX, l_BKX, acc_BKXH = carry
        start = jnp.minimum(index * pages, J - pages)  # the last block may reach back into the one before
        row_1MR = (start * R + jnp.arange(pages * R)).reshape(1, pages, R)
        live_BMR = (row_1MR >= first_B[:, None, None]) & (row_1MR < end_B[:, None, None])
        live_BMR = live_BMR & (row_1MR >= index * pages * R)
        page_BM = layer * pool + jax.lax.dynamic_slice_in_dim(page_BJ, start, pages, axis=1)

        def half(lane):
            return _gather(pages_KRC, page_BM, (K, R, H), lane).astype(jnp.float32)

        k_BMKRH = half(0)
        score_BMKXR = _joined([(k_BMKRH * q_BKXH[:, None, :, x, None]).sum(-1) for x in range(X)], axis=3)
        scale_BMK2R = None
        if scale_LPK2R is not None:
            scale_BMK2R = _gather(scale_LPK2R.reshape(L * pool, K, 2, R), page_BM, (K, 2, R), 0)
            scale_BMK2R = jnp.where(live_BMR[:, :, None, None], scale_BMK2R, 0)
            score_BMKXR = score_BMKXR * scale_BMK2R[:, :, :, :1]
        is_seen_BMXR = live_BMR[:, :, None]
        if window is not None and W > 1:
            first_BX = first_seen(length_B[:, None], window, token_1X)
            is_seen_BMXR = is_seen_BMXR & (row_1MR[:, :, None] >= first_BX[:, None, :, None])
        score_BMKXR = jnp.where(is_seen_BMXR[:, :, None], cap_scores(score_BMKXR, soft_cap), -jnp.inf)
        m_next_BKX = jnp.maximum(m_BKX, score_BMKXR.max(axis=(1, 4)))
        p_BMKXR = jnp.exp(score_BMKXR - m_next_BKX[:, None, :, :, None])
        decay_BKX = jnp.exp(m_BKX - m_next_BKX)
        l_BKX = l_BKX * decay_BKX + p_BMKXR.sum(axis=(1, 4))
        weight_BMKXR = p_BMKXR if scale_BMK2R is None else p_BMKXR * scale_BMK2R[:, :, :, 1:]
        # Dead rows may hold NaN, and 0 * NaN is NaN: masking the scores alone is not enough.
        v_BMKRH = jnp.where(live_BMR[:, :, None, :, None], half(H), 0)
        seen_BKXH = _joined([(v_BMKRH * weight_BMKXR[:, :, :, x, :, None]).sum((1, 3)) for x in range(X)], axis=2)
        return m_next_BKX, l_BKX, acc_BKXH * decay_BKX[..., None] + seen_BKXH

    rows = pages * R
    first_block = jnp.min(first_B, where=end_B > 0, initial=J * R) // rows
    end_block = (end_B.max() + rows - 1) // rows
    _, l_BKX, acc_BKXH = jax.lax.fori_loop(first_block, end_block, add_block, (m_BKX, l_BKX, acc_BKXH))
    return by_token(acc_BKXH / l_BKX[..., None], W).astype(q_BWNH.dtype)


def _gather(pages: jax.Array, page_BM: jax.Array, sizes: tuple[int, int, int], lane: int) -> jax.Array:
    """[B, M, *sizes]: of each page the lanes from `lane` on. A page outside the pool is the nearest in it."""
    start_BM2 = jnp.stack([page_BM, jnp.full_like(page_BM, lane)], axis=-1)
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3, 4), collapsed_slice_dims=(0,), start_index_map=(0, 3))
    return jax.lax.gather(pages, start_BM2, numbers, (1, *sizes), mode="clip")


def _joined(of_heads: list[jax.Array], axis: int) -> jax.Array:
    """The arrays of a group's heads along an axis of their own, none of them fused with what takes them."""
    return jnp.stack(jax.lax.optimization_barrier(of_heads), axis=axis)


def pages_a_block(page_bytes: int, page_rows: int, pages_of_a_slot: int) -> int:
    """The most pages of a slot that keep to BLOCK_BYTES and BLOCK_ROWS; at least one, at most all.

    `page_bytes` is one page of each slot, all heads.
    """
    return max(1, min(BLOCK_BYTES // page_bytes, BLOCK_ROWS // page_rows, pages_of_a_slot))
