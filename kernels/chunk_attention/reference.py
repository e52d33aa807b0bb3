"""Chunk attention in plain XLA: the definition, and what runs on CPUs without native kernels."""

import math

import jax
import jax.numpy as jnp

from ..scores import add_sink, cap_scores, exact_scale

BLOCK = 128
"""Tokens of a chunk that are queries together, and keys together, fewer where a page has fewer: their scores stay in a
CPU's cache. N, K, H = 9, 3, 64 in f32 on 2 CPU cores without cached rows, ms in blocks of 64, 128 and 256: T = 512 2.9,
2.9, 3.4; T = 1024 11.3, 10.5, 11.1."""


def chunk_attention_reference(
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
    """`op.chunk_attention` on one shard's heads; `layer` and `window` are i32 scalars. Scores and softmax in f32.

    Block after block of a text's queries, an online softmax that starts from the block itself, of which every query
    sees something, and goes on over the text's rows before it, cached and the chunk's own, from the first that the
    block's first query sees. One loop for both, whose bounds are data: with a loop each, 30 layers took twice as long
    to compile. Nothing is computed that no query of a block sees.

    k and v of a page are cut out apart: each is copied, which is little beside the products. Use f32 on CPUs: XLA:CPU
    slices bf16 by way of an f32 copy of the whole cache.
    """
    (T, N, H), K, R, M = q_TNH.shape, k_TKH.shape[1], cache_LPKRC.shape[3], start_M.size
    G, keys = N // K, math.gcd(BLOCK, R)
    block = min(keys, T // M)
    blocks = -(-T // M // block)  # of a text; I are those of all

    def in_blocks(x_TKH: jax.Array) -> jax.Array:
        """[I, K, block, H]; a text's last block is filled up with zeros."""
        x_MTKH = x_TKH.reshape(M, T // M, *x_TKH.shape[1:])
        x_MTKH = jnp.pad(x_MTKH, ((0, 0), (0, blocks * block - T // M), (0, 0), (0, 0)))
        return x_MTKH.reshape(M * blocks, block, *x_TKH.shape[1:]).swapaxes(1, 2)

    exact = exact_scale(H)  # of queries, a tenth faster than of scores
    q_IKXH = in_blocks(q_TNH * exact).reshape(M * blocks, K, G * block, H)
    k_IKSH, v_IKSH = in_blocks(k_TKH), in_blocks(v_TKH)
    # Below, X is a group's queries of one block, S the keys of a block or page.
    at_X = jnp.tile(jnp.arange(block), G)
    sink_KX = None if sink_N is None else sink_N.reshape(K, G).repeat(block, axis=1)

    def attend_block(i, out_IKXH):
        text, own = i // blocks, i % blocks
        q_KXH, start = q_IKXH[i], start_M[text]

        def scores(k_KSH, seen_XS, scale_K1S=None):
            score_KXS = jnp.einsum("KXH,KSH->KXS", q_KXH, k_KSH, preferred_element_type=jnp.float32)
            score_KXS = score_KXS * (H**-0.5 / exact)
            score_KXS = cap_scores(score_KXS if scale_K1S is None else score_KXS * scale_K1S, soft_cap)
            return score_KXS if seen_XS is None else jnp.where(seen_XS[None], score_KXS, -jnp.inf)

        def weigh(score_KXS, m_KX, v_KSH, scale_K1S=None):
            """Sums of exp(score - m) and of exp(score - m) v."""
            p_KXS = jnp.exp(score_KXS - m_KX[..., None])
            weight_KXS = (p_KXS if scale_K1S is None else p_KXS * scale_K1S).astype(v_KSH.dtype)
            acc_KXH = jnp.einsum("KXS,KSH->KXH", weight_KXS, v_KSH, preferred_element_type=jnp.float32)
            return p_KXS.sum(axis=-1), acc_KXH

        def cached_rows(j):
            page, row, zero = page_MJ[text, j * keys // R], j * keys % R, jnp.int32(0)

            def cut(leaf, start, sizes):
                return jax.lax.dynamic_slice(leaf, (layer, page, zero, *start), (1, 1, K, *sizes))[0, 0]

            k_KSH, v_KSH = (cut(cache_LPKRC, (row, jnp.int32(lane)), (keys, H)).astype(q_TNH.dtype) for lane in (0, H))
            return k_KSH, v_KSH, None if scale_LPK2R is None else cut(scale_LPK2R, (zero, row), (2, keys))

        def own_rows(j):
            at = text * blocks + j - start // keys
            return k_IKSH[at], v_IKSH[at], None if scale_LPK2R is None else jnp.ones((K, 2, keys))

        def add_rows(j, carry):
            """The text's rows from j * keys on: whole blocks of the cache, then of the chunk."""
            if blocks == 1:
                k_KSH, v_KSH, scale_K2S = cached_rows(j)
            else:
                k_KSH, v_KSH, scale_K2S = jax.lax.cond(j * keys < start, cached_rows, own_rows, j)
            seen_XS = None
            if window is not None:
                seen_XS = (start + own * block + at_X)[:, None] - (j * keys + jnp.arange(keys))[None, :] < window
            scale_k_K1S, scale_v_K1S = (None, None) if scale_K2S is None else jnp.split(scale_K2S, 2, axis=1)
            score_KXS = scores(k_KSH, seen_XS, scale_k_K1S)
            m_KX, l_KX, acc_KXH = carry
            m_next_KX = jnp.maximum(m_KX, score_KXS.max(axis=-1))
            decay_KX = jnp.exp(m_KX - m_next_KX)
            l_new_KX, acc_new_KXH = weigh(score_KXS, m_next_KX, v_KSH, scale_v_K1S)
            return m_next_KX, l_KX * decay_KX + l_new_KX, acc_KXH * decay_KX[..., None] + acc_new_KXH

        before_XS = at_X[:, None] - jnp.arange(block)[None, :]
        score_KXS = scores(k_IKSH[i], before_XS >= 0 if window is None else (before_XS >= 0) & (before_XS < window))
        m_KX = score_KXS.max(axis=-1)
        carry = add_sink(m_KX, *weigh(score_KXS, m_KX, v_IKSH[i]), sink_KX)
        first = 0 if window is None else jnp.maximum(start + own * block - window + 1, 0)
        _, l_KX, acc_KXH = jax.lax.fori_loop(first // keys, start // keys + own, add_rows, carry)
        return out_IKXH.at[i].set((acc_KXH / l_KX[..., None]).astype(q_TNH.dtype))

    out_IKXH = jax.lax.fori_loop(0, M * blocks, attend_block, jnp.zeros_like(q_IKXH))
    out_MTKGH = out_IKXH.reshape(M, blocks, K, G, block, H).transpose(0, 1, 4, 2, 3, 5).reshape(M, -1, N, H)
    return out_MTKGH[:, : T // M].reshape(T, N, H)
