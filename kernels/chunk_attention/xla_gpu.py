"""Chunk attention in plain XLA for GPUs: few large products, and few turns of a loop that the host waits for."""

import jax
import jax.numpy as jnp

from ..scores import add_sink, cap_scores

QUERIES = 256
"""Tokens of a chunk that are queries together over the chunk's own rows before them."""
SCORE_BYTES, BLOCK_ROWS = 128 * 2**20, 1024
"""What one turn of the loop over cached rows makes at most: bytes of scores, and rows of a text."""


def chunk_attention_gpu(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    cache_LPKRC: jax.Array,
    scale_LPK2R: jax.Array | None,
    layer: jax.Array,
    start_M: jax.Array,
    page_MJ: jax.Array,
    window: jax.Array | None,
    sink_N: jax.Array | None,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """`op.chunk_attention` on one shard's heads, as the reference has it; `layer` and `window` are i32 scalars.

    The chunk's own rows come first, unrolled, each block of queries over all keys up to its end; a window only masks
    there. Then a loop over blocks of pages, of all texts at once, each for all queries: its turns are few, since each
    is a look of the host at the loop's condition. A block's rows are gathered into memory, where the products' many
    queries read them again and again. Layers and pages are one axis there: a slice with an axis of size 1 made the
    compiler transpose the whole cache.
    """
    (T, N, H), (L, pool, K, R, C), (M, J) = q_TNH.shape, cache_LPKRC.shape, page_MJ.shape
    G, tokens = N // K, T // M
    q_MKGTH = q_TNH.reshape(M, tokens, K, G, H).transpose(0, 2, 3, 1, 4)
    k_MKTH, v_MKTH = (x_TKH.reshape(M, tokens, K, H).swapaxes(1, 2) for x_TKH in (k_TKH, v_TKH))

    def scores(q_MKGTH, k_MKSH, seen_MTS, scale_MKS=None):
        score_MKGTS = jnp.einsum("MKGTH,MKSH->MKGTS", q_MKGTH, k_MKSH, preferred_element_type=jnp.float32) * H**-0.5
        score_MKGTS = score_MKGTS if scale_MKS is None else score_MKGTS * scale_MKS[:, :, None, None]
        return jnp.where(seen_MTS[:, None, None], cap_scores(score_MKGTS, soft_cap), -jnp.inf)

    def weigh(score_MKGTS, m_MKGT, v_MKSH, scale_MKS=None):
        """Sums of exp(score - m) and of exp(score - m) v."""
        p_MKGTS = jnp.exp(score_MKGTS - m_MKGT[..., None])
        weight_MKGTS = p_MKGTS if scale_MKS is None else p_MKGTS * scale_MKS[:, :, None, None]
        weight_MKGTS = weight_MKGTS.astype(v_MKSH.dtype)
        acc_MKGTH = jnp.einsum("MKGTS,MKSH->MKGTH", weight_MKGTS, v_MKSH, preferred_element_type=jnp.float32)
        return p_MKGTS.sum(axis=-1), acc_MKGTH

    def within(before_TS):
        return before_TS >= 0 if window is None else (before_TS >= 0) & (before_TS < window)

    def attend_own(start: int):
        end = min(start + QUERIES, tokens)
        seen_TS = within(jnp.arange(start, end)[:, None] - jnp.arange(end)[None, :])
        score_MKGTS = scores(q_MKGTH[:, :, :, start:end], k_MKTH[:, :, :end], seen_TS[None])
        m_MKGT = score_MKGTS.max(axis=-1)
        return m_MKGT, *weigh(score_MKGTS, m_MKGT, v_MKTH[:, :, :end])

    of_blocks = [attend_own(start) for start in range(0, tokens, QUERIES)]
    m_MKGT, l_MKGT, acc_MKGTH = (jnp.concatenate(parts, axis=3) for parts in zip(*of_blocks, strict=True))
    own = add_sink(m_MKGT, l_MKGT, acc_MKGTH, None if sink_N is None else sink_N.reshape(K, G, 1))

    pages = max(1, min(BLOCK_ROWS // R, SCORE_BYTES // (4 * T * N * R), J))
    rows = pages * R
    pages_KRC = cache_LPKRC.reshape(L * pool, K, R, C)
    first_M = jnp.zeros_like(start_M) if window is None else jnp.maximum(start_M - window + 1, 0)
    position_MT = start_M[:, None] + jnp.arange(tokens)[None, :]

    def add_block(index, carry):
        m_MKGT, l_MKGT, acc_MKGTH = carry
        row_S = index * rows + jnp.arange(rows)
        live_MS = (row_S[None, :] >= first_M[:, None]) & (row_S[None, :] < start_M[:, None])
        at_MB = layer * pool + page_MJ[:, jnp.minimum(index * pages + jnp.arange(pages), J - 1)]

        def of_pages(leaf, rows_axis):
            """[M, K, ...], the pages' rows one behind the other."""
            x = jnp.moveaxis(leaf.at[at_MB].get(mode="clip"), 1, rows_axis)
            return x.reshape(*x.shape[:rows_axis], rows, *x.shape[rows_axis + 2 :])

        rows_MKSC = of_pages(pages_KRC, 2)
        # Rows that are not live may hold NaN, and 0 * NaN is NaN: masking the scores alone is not enough.
        k_MKSH = rows_MKSC[..., :H].astype(q_TNH.dtype)
        v_MKSH = jnp.where(live_MS[:, None, :, None], rows_MKSC[..., H:], 0).astype(q_TNH.dtype)
        scale_k_MKS = scale_v_MKS = None
        if scale_LPK2R is not None:
            scale_MK2S = of_pages(scale_LPK2R.reshape(L * pool, K, 2, R), 3)
            scale_MK2S = jnp.where(live_MS[:, None, None], scale_MK2S, 0)
            scale_k_MKS, scale_v_MKS = scale_MK2S[:, :, 0], scale_MK2S[:, :, 1]
        seen_MTS = within(position_MT[:, :, None] - row_S[None, None, :]) & live_MS[:, None, :]
        score_MKGTS = scores(q_MKGTH, k_MKSH, seen_MTS, scale_k_MKS)
        m_next_MKGT = jnp.maximum(m_MKGT, score_MKGTS.max(axis=-1))
        decay_MKGT = jnp.exp(m_MKGT - m_next_MKGT)
        l_new_MKGT, acc_new_MKGTH = weigh(score_MKGTS, m_next_MKGT, v_MKSH, scale_v_MKS)
        return (
            m_next_MKGT,
            l_MKGT * decay_MKGT + l_new_MKGT,
            acc_MKGTH * decay_MKGT[..., None] + acc_new_MKGTH,
        )

    first = jnp.min(first_M, where=start_M > 0, initial=J * R)
    end = (start_M.max() + rows - 1) // rows
    _, l_MKGT, acc_MKGTH = jax.lax.fori_loop(first // rows, end, add_block, own)
    out_MKGTH = (acc_MKGTH / l_MKGT[..., None]).astype(q_TNH.dtype)
    return out_MKGTH.transpose(0, 3, 1, 2, 4).reshape(T, N, H)
