"""`attend` for the ways through the model: a step's tokens against the cache, pieces of texts against the cache and
themselves, and both together.

A model hands over q, k, v of its rows and gets back what they attend to; where keys and values live, and how far back
a layer sees, is decided here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..cache_manager import KV, Codec, prompt_rows, rows
from ..kernels import Backend, attention_steps, chunk_attention, is_xla, ragged_attention


class Call(Protocol):
    """Attention of one layer."""

    def __call__(
        self,
        layer: jax.Array | int,
        kind: jax.Array | int,
        q_RNH: jax.Array,
        k_RKH: jax.Array,
        v_RKH: jax.Array,
        sink_N: jax.Array | None = None,
        /,
    ) -> jax.Array:
        """out_RNH. The layer's kind is a Python int, or traced under a scan."""
        ...


class Attend(NamedTuple):
    """How the layers of one program attend."""

    kind_of_layer: tuple[int, ...]
    """Layers of one kind see equally far."""
    call: Call
    stored: Callable[[jax.Array, jax.Array], Any]
    """(k_RKH, v_RKH) -> what the program hands on of a layer"""


def stored_head_dim(head_dim: int, backend: Backend) -> int:
    """H of the cache: on TPUs its rows, k and v side by side, are whole tiles of 128 lanes, heads padded with zeros."""
    return head_dim if is_xla(backend) else -(-head_dim // 64) * 64


def attend_cache(
    cache: KV,
    length_B: jax.Array,
    page_BJ: jax.Array,
    *,
    max_pages: int | None = None,
    window_of_layer: Sequence[int | None] = (None,),
    soft_cap: float | None = None,
    mesh: jax.sharding.Mesh,
    backend: Backend,
) -> Attend:
    """Rows are the step's tokens, W of each slot side by side: each attends to its slot's first `length` cached tokens,
    to the slot's new ones before it and to itself. W follows from the number of rows.

    Args:
        page_BJ: i32, the page table.
        max_pages: entries of the table that hold live rows at once, at most; see `attention_steps`.
        window_of_layer: how many tokens each layer sees, the token itself included; None is all.
        soft_cap: scores become cap * tanh(score / cap).
    """
    R, C = cache.rows.shape[3:]
    slots, reach = length_B.shape[0], page_BJ.shape[1] * R
    windows, kind_of_layer = _kinds(window_of_layer, reach)
    steps = [
        attention_steps(cache.rows, length_B, page_BJ, window=window, max_pages=max_pages, mesh=mesh, backend=backend)
        for window in windows
    ]

    def of_slots(x_RNH):
        return x_RNH.reshape(slots, -1, *x_RNH.shape[1:])

    def attend(layer, kind, q_RNH, k_RKH, v_RKH, sink_N=None):
        window, of_window = _chosen(windows, kind, reach + 1), steps[0] if len(steps) == 1 else _one_of(steps, kind)
        out_BWNH = ragged_attention(
            of_slots(_queries(q_RNH, C // 2)), of_slots(stored(k_RKH, v_RKH)), cache.rows, layer, length_B, page_BJ,
            of_window, scale_LPK2R=cache.scales, window=window, soft_cap=soft_cap, sink_N=sink_N, mesh=mesh,
            backend=backend,
        )  # fmt: skip
        return out_BWNH[..., : q_RNH.shape[-1]].reshape(q_RNH.shape)

    def stored(k_RKH, v_RKH):
        return rows(_padded(k_RKH, C // 2), _padded(v_RKH, C // 2))

    return Attend(kind_of_layer, attend, stored)


def attend_chunk(
    cache: KV,
    start_N: jax.Array,
    page_NJ: jax.Array,
    *,
    count_N: jax.Array | None = None,
    codec: Codec,
    window_of_layer: Sequence[int | None] = (None,),
    soft_cap: float | None = None,
    mesh: jax.sharding.Mesh,
    backend: Backend,
) -> Attend:
    """Rows are N pieces of texts, padding included, one piece behind another: each token attends to its text's first
    `start` tokens, which the cache has, to those of its piece before it and to itself.

    Args:
        start_N: i32, whole pages.
        page_NJ: i32, the texts' pages.
        count_N: i32, tokens of each piece, the others are padding; None: all.
        codec: the cache's.

    The rest is as for `attend_cache`.
    """
    R, C = cache.rows.shape[3:]
    reach = page_NJ.shape[1] * R
    windows, kind_of_layer = _kinds(window_of_layer, reach)

    def attend(layer, kind, q_TNH, k_TKH, v_TKH, sink_N=None):
        out_TNH = chunk_attention(
            _queries(q_TNH, C // 2), _padded(k_TKH, C // 2), _padded(v_TKH, C // 2), cache.rows, layer, start_N,
            page_NJ, count_M=count_N, scale_LPK2R=cache.scales, window=_chosen(windows, kind, reach),
            soft_cap=soft_cap, sink_N=sink_N, mesh=mesh, backend=backend,
        )  # fmt: skip
        return out_TNH[..., : q_TNH.shape[-1]]

    def stored(k_TKH, v_TKH):
        return prompt_rows(_padded(k_TKH, C // 2), _padded(v_TKH, C // 2), codec)

    return Attend(kind_of_layer, attend, stored)


def attend_both(step: Attend, chunk: Attend, slots: int) -> Attend:
    """Rows are so many slots, and pieces of texts behind them: each attend as they do alone, of the same cache and the
    same layers. What is stored is a pair."""

    def attend(layer, kind, q_RNH, k_RKH, v_RKH, sink_N=None):
        of_step = step.call(layer, kind, q_RNH[:slots], k_RKH[:slots], v_RKH[:slots], sink_N)
        of_chunk = chunk.call(layer, kind, q_RNH[slots:], k_RKH[slots:], v_RKH[slots:], sink_N)
        return jnp.concatenate([of_step, of_chunk])

    def stored(k_RKH, v_RKH):
        return step.stored(k_RKH[:slots], v_RKH[:slots]), chunk.stored(k_RKH[slots:], v_RKH[slots:])

    return Attend(step.kind_of_layer, attend, stored)


def _kinds(window_of_layer: Sequence[int | None], reach: int) -> tuple[list[int | None], tuple[int, ...]]:
    """The windows there are, and which each layer has; one that cuts nothing off from `reach` tokens is none."""
    window_of_layer = [None if window is None or window >= reach else window for window in window_of_layer]
    windows = list(dict.fromkeys(window_of_layer))
    return windows, tuple(windows.index(window) for window in window_of_layer)


def _chosen(windows: list[int | None], kind: jax.Array | int, everything: int) -> jax.Array | int | None:
    if len(windows) == 1:
        return windows[0]
    if isinstance(kind, int):
        return windows[kind]
    return jnp.asarray([everything if window is None else window for window in windows], jnp.int32)[kind]


def _one_of(trees: list, kind: jax.Array | int):
    """One of several trees of the same shape; a traced `kind` selects."""
    return trees[kind] if isinstance(kind, int) else jax.tree.map(lambda *leaves: jnp.stack(leaves)[kind], *trees)


def _padded(x_RKH: jax.Array, head_dim: int) -> jax.Array:
    """Heads filled up with zeros, which add nothing to a score."""
    missing = head_dim - x_RKH.shape[-1]
    return jnp.pad(x_RKH, ((0, 0), (0, 0), (0, missing))) if missing else x_RKH


def _queries(q_RNH: jax.Array, head_dim: int) -> jax.Array:
    """Likewise, and made up for the kernels' scale, which goes by the padded width."""
    H = q_RNH.shape[-1]
    return _padded(q_RNH * (head_dim / H) ** 0.5, head_dim) if head_dim != H else q_RNH
