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
    cache_LPKRC: jax.Array,
    scale_LPK2R: jax.Array | None,
    layer: jax.Array,
    length_B: jax.Array,
    page_BJ: jax.Array,
    window: jax.Array | None,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """`op.ragged_attention` on one shard's heads, as the reference has it; `layer` and `window` are i32 scalars.

    What XLA's GPU compiler makes of a block of pages decides its form (docs/gpu-evidence.md has the numbers):

    - Layers and pages are one axis, so that what is gathered has no axis of size 1.
    - Products are multiplied and summed, not dots. A dot wants its operand in memory: a block that is gathered and
      masked for it would be written and read again. A sum reads rows, mask and all, straight from the cache.
    - k and v are read apart, each once: a gather takes the half of a row that its sum wants. The heads of a group
      follow one another in the scores' last axis, so that a row is still in the L1 cache for the next of them; over v
      there is a sum a head, which the compiler joins.
    """
    (B, N, H), (L, pool, K, R, C), J = q_BNH.shape, cache_LPKRC.shape, page_BJ.shape[1]
    G, pages = N // K, pages_a_block(B * R * K * C * cache_LPKRC.dtype.itemsize, J)
    pages_KRC = cache_LPKRC.reshape(L * pool, K, R, C)
    q_BKGH = q_BNH.reshape(B, K, G, H).astype(jnp.float32) * H**-0.5
    new_BKC = new_BKC.astype(jnp.float32)
    m_BKG = cap_scores((q_BKGH * new_BKC[:, :, None, :H]).sum(-1), soft_cap)
    l_BKG = jnp.ones_like(m_BKG)
    acc_BKGH = jnp.broadcast_to(new_BKC[:, :, None, H:], q_BKGH.shape)
    first_B, end_B = rows_seen(length_B, window)
    first_B, end_B = jnp.broadcast_to(first_B, end_B.shape), jnp.minimum(end_B, J * R)

    def add_block(index, carry):
        m_BKG, l_BKG, acc_BKGH = carry
        row_JR = (index * pages * R + jnp.arange(pages * R)).reshape(pages, R)
        live_BJR = (row_JR[None] >= first_B[:, None, None]) & (row_JR[None] < end_B[:, None, None])
        ids_BJ = layer * pool + jax.lax.dynamic_slice_in_dim(page_BJ, index * pages, pages, axis=1)

        def half(lane):
            return _gather(pages_KRC, ids_BJ, (K, R, H), lane).astype(jnp.float32)

        score_BJKRG = (half(0)[..., None, :] * q_BKGH[:, None, :, None]).sum(-1)
        scale_BJK2R = None
        if scale_LPK2R is not None:
            scale_BJK2R = _gather(scale_LPK2R.reshape(L * pool, K, 2, R), ids_BJ, (K, 2, R), 0)
            scale_BJK2R = jnp.where(live_BJR[:, :, None, None], scale_BJK2R, 0)
            score_BJKRG = score_BJKRG * scale_BJK2R[:, :, :, 0, :, None]
        live_BJ1R1 = live_BJR[:, :, None, :, None]
        score_BJKRG = jnp.where(live_BJ1R1, cap_scores(score_BJKRG, soft_cap), -jnp.inf)
        m_next_BKG = jnp.maximum(m_BKG, score_BJKRG.max(axis=(1, 3)))
        p_BJKRG = jnp.exp(score_BJKRG - m_next_BKG[:, None, :, None])
        decay_BKG = jnp.exp(m_BKG - m_next_BKG)
        l_BKG = l_BKG * decay_BKG + p_BJKRG.sum(axis=(1, 3))
        weight_BJKRG = p_BJKRG if scale_BJK2R is None else p_BJKRG * scale_BJK2R[:, :, :, 1, :, None]
        # Dead rows may hold NaN, and 0 * NaN is NaN: masking the scores alone is not enough.
        v_BJKRH = jnp.where(live_BJ1R1, half(H), 0)
        seen_BKGH = jnp.stack([(v_BJKRH * weight_BJKRG[..., g, None]).sum((1, 3)) for g in range(G)], axis=2)
        return m_next_BKG, l_BKG, acc_BKGH * decay_BKG[..., None] + seen_BKGH

    rows = pages * R
    first_block = jnp.min(first_B, where=end_B > 0, initial=J * R) // rows
    end_block = (end_B.max() + rows - 1) // rows
    _, l_BKG, acc_BKGH = jax.lax.fori_loop(first_block, end_block, add_block, (m_BKG, l_BKG, acc_BKGH))
    return (acc_BKGH / l_BKG[..., None]).reshape(B, N, H).astype(q_BNH.dtype)


def _gather(pages: jax.Array, page_BJ: jax.Array, sizes: tuple[int, int, int], lane: int) -> jax.Array:
    """[B, J, *sizes]: of each page the lanes from `lane` on. A page outside the pool is the nearest in it."""
    start_BJ2 = jnp.stack([page_BJ, jnp.full_like(page_BJ, lane)], axis=-1)
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3, 4), collapsed_slice_dims=(0,), start_index_map=(0, 3))
    return jax.lax.gather(pages, start_BJ2, numbers, (1, *sizes), mode="clip")


def pages_a_block(bytes_of_all_slots: int, pages_of_a_slot: int) -> int:
    """The most pages, a divisor of a slot's, that keep to BLOCK_BYTES, `bytes_of_all_slots` for one of each slot."""
    most = max(1, BLOCK_BYTES // bytes_of_all_slots)
    return max(part for part in range(1, pages_of_a_slot + 1) if pages_of_a_slot % part == 0 and part <= most)
