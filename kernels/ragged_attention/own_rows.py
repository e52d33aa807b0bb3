"""A step's own tokens: W rows a slot, behind the cached ones, which see these and, causally, each other.

Heads of one kv head and all tokens of a slot read the same rows of the cache, so they stand side by side there: X = W G
queries, row x being head x % G of token x // G.
"""

import jax
import jax.numpy as jnp

from ..scores import add_sink, cap_scores


def by_kv_head(q_BWNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Queries as q_BKXH."""
    B, W, N, H = q_BWNH.shape
    q_BWKGH = q_BWNH.reshape(B, W, num_kv_heads, N // num_kv_heads, H)
    return q_BWKGH.swapaxes(1, 2).reshape(B, num_kv_heads, -1, H)


def by_token(out_BKXH: jax.Array, tokens: int) -> jax.Array:
    """What `by_kv_head` made, as out_BWNH again."""
    B, K, X, H = out_BKXH.shape
    return out_BKXH.reshape(B, K, tokens, X // tokens, H).swapaxes(1, 2).reshape(B, tokens, -1, H)


def first_seen(length: jax.Array, window: jax.Array, token: jax.Array) -> jax.Array:
    """The first row that a step's token sees; at or past `length` where it sees no cached one."""
    return length + token - window + 1


def sinks_by_kv_head(sink_N: jax.Array, num_kv_heads: int, tokens: int) -> jax.Array:
    """The query heads' sinks as sink_KX."""
    return jnp.tile(sink_N.reshape(num_kv_heads, -1), (1, tokens))


def attend_own(
    q_BKXH: jax.Array,
    new_BKWC: jax.Array,
    window: jax.Array | None,
    soft_cap: float | None,
    sink_N: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(m_BKX, l_BKX, acc_BKXH): the softmax over the step's own rows, for that over the cached ones to go on from.

    A token that sees itself alone, and no sink, has l = 1 and acc = its own v, exactly. All are f32, q scaled. What is
    multiplied and summed, the compilers of CPUs and GPUs join to a loop or two; so few products are not worth a dot.
    """
    (_, K, X, H), W = q_BKXH.shape, new_BKWC.shape[2]
    before_XW = jnp.arange(X)[:, None] // (X // W) - jnp.arange(W)[None, :]
    is_seen_XW = before_XW >= 0 if window is None else (before_XW >= 0) & (before_XW < window)
    score_BKXW = (q_BKXH[:, :, :, None] * new_BKWC[:, :, None, :, :H]).sum(axis=-1)
    score_BKXW = jnp.where(is_seen_XW[None, None], cap_scores(score_BKXW, soft_cap), -jnp.inf)
    m_BKX = score_BKXW.max(axis=-1)
    p_BKXW = jnp.exp(score_BKXW - m_BKX[..., None])
    acc_BKXH = (p_BKXW[..., None] * new_BKWC[:, :, None, :, H:]).sum(axis=3)
    sink_KX = None if sink_N is None else sinks_by_kv_head(sink_N, K, W)
    return add_sink(m_BKX, p_BKXW.sum(axis=-1), acc_BKXH, sink_KX)
