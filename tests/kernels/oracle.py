"""Attention written plainly in float64 numpy, one query at a time, and helpers that make inputs."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (lets numpy cast bf16)
import numpy as np

from tests.arrays import array

TOLERANCE: dict[str, Any] = {
    "float32": {"rtol": 1e-5, "atol": 1e-5},
    "bfloat16": {"rtol": 8e-3, "atol": 4e-3},
}  # bf16: 2 units of 2**-8


def attend_one(q_H, k_SH, v_SH, soft_cap=None, sink=-np.inf):
    """Softmax attention of one query over S keys; `sink` is a score more, of no value."""
    score_S = k_SH @ q_H / np.sqrt(len(q_H))
    if soft_cap is not None:
        score_S = soft_cap * np.tanh(score_S / soft_cap)
    most = max(score_S.max(), sink)
    weight_S = np.exp(score_S - most)
    return weight_S @ v_SH / (weight_S.sum() + np.exp(sink - most))


def ragged_attention(q_BWNH, new_BWKC, cache_LBKSC, layer, length_B, window=None, soft_cap=None, sink_N=None):
    """Decode attention; rows past a slot's length or before a token's window are not looked at."""
    q_BWNH, new_BWKC, cache_LBKSC = (np.asarray(x).astype(np.float64) for x in (q_BWNH, new_BWKC, cache_LBKSC))
    (_, W, N, H), K = q_BWNH.shape, new_BWKC.shape[2]
    out_BWNH = np.empty(q_BWNH.shape)
    for b, length in enumerate(np.asarray(length_B).tolist()):
        for w, n in np.ndindex(W, N):
            kv, first = n // (N // K), 0 if window is None else max(0, length + w + 1 - window)
            rows_SC = np.concatenate([cache_LBKSC[layer, b, kv, :length], new_BWKC[b, : w + 1, kv]])[first:]
            sink = -np.inf if sink_N is None else sink_N[n]
            out_BWNH[b, w, n] = attend_one(q_BWNH[b, w, n], rows_SC[:, :H], rows_SC[:, H:], soft_cap, sink)
    return out_BWNH


def chunk_attention(q_TNH, k_SKH, v_SKH, window=None, soft_cap=None, sink_N=None):
    """Causal attention of a text's last T tokens over all S."""
    (T, N, H), (S, K, _) = q_TNH.shape, k_SKH.shape
    before_TS = (S - T + np.arange(T))[:, None] - np.arange(S)[None, :]  # how far a key lies back
    seen_TS = (before_TS >= 0) & (before_TS < (window or S + 1))
    out_TNH = np.empty((T, N, H))
    for n in range(N):
        kv = n // (N // K)
        score_TS = q_TNH[:, n] @ k_SKH[:, kv].T / np.sqrt(H)
        if soft_cap is not None:
            score_TS = soft_cap * np.tanh(score_TS / soft_cap)
        score_TS = np.where(seen_TS, score_TS, -np.inf)
        sink = -np.inf if sink_N is None else sink_N[n]
        most_T1 = np.maximum(score_TS.max(axis=1, keepdims=True), sink)
        weight_TS = np.exp(score_TS - most_T1)
        whole_T1 = weight_TS.sum(axis=1, keepdims=True) + np.exp(sink - most_T1)
        out_TNH[:, n] = weight_TS @ v_SKH[:, kv] / whole_T1
    return out_TNH


def normal(seed, *shape, dtype=jnp.float32, times=1):
    """Normal values. Made by numpy, since JAX would compile each line for each shape."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))
    return array(values * values.dtype.type(times))


def assert_close(actual, expected):
    """Within the tolerance of `actual`'s dtype."""
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), expected, **TOLERANCE[str(actual.dtype)])


def bits(array):
    """The array's bits as unsigned integers, so that NaNs compare."""
    array = np.asarray(array)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def paged(leaf, page_BJ, pool, rows, row_axis=3):
    """A contiguous [L, B, K, S, C] (or [L, B, K, 2, S] with `row_axis` 4) in the pages [L, P, K, R, C] of a pool of P:
    NaN, or 99 in codes, in all others; what the table does not have (-1) is left out."""
    leaf = np.moveaxis(np.asarray(leaf), row_axis, 3)
    L, B, K, S, C = leaf.shape
    pages = np.full((L, pool, K, rows, C), 99 if leaf.dtype == np.int8 else np.nan, leaf.dtype)
    for b in range(B):
        for j in range(S // rows):
            if page_BJ[b, j] >= 0:
                pages[:, page_BJ[b, j]] = leaf[:, b, :, j * rows : (j + 1) * rows]
    return array(np.moveaxis(pages, 3, row_axis))


def table(lengths, S, rows, seed=0):
    """(page_BJ scattered over a pool, the pool's pages): -1 where no row of a slot is, and 2 pages in no table."""
    J = S // rows
    pool = len(lengths) * J + 2
    page_BJ = np.random.default_rng(seed).permutation(pool)[: len(lengths) * J].reshape(-1, J).astype(np.int32)
    return np.where(np.arange(J) * rows < np.asarray(lengths)[:, None], page_BJ, -1), pool
