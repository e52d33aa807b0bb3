"""Decode attention on TPU: a Mosaic kernel that streams the live pages of the cache through VMEM.

One step sees one page of one slot, of all kv heads that the chip holds: in one layer a page is one run of memory, so
one DMA. The grid is as long as the slots' live pages are many, its size known only at run time: `live_steps` lists
them. The pipeline fetches a page only when its index differs from the step before, so a slot without rows, which has a
step for its answer, repeats its neighbour's.

The compiler's schedule for v5e (`kernel_report.py`) with 1 kv head, H = 128, bf16 and pages of 512 rows, which take 480
cycles to arrive from HBM: a whole page's step issues 286 bundles, one a cycle. Inside the whole step it is 215, as XLA
hands q and the new rows over in VMEM there. Several pages a step, in one update of the softmax, cost more than one
page of their size: 341 bundles for two of 256 rows. So a page is what a step reads.

A step's W tokens of a slot are W G rows of one product, over one read of the page: docs/tpu-evidence.md has the bundles
of W = 4 and 8.

A window is a second border: its steps begin at its first page, which is masked as the last one is. It adds 11 bundles
to a whole page's step, a soft cap 2; a program with neither has nothing of them.

Of an int8 cache a page's codes become bf16 in VMEM. Their scales are one number a row: k's multiplies the row's score,
v's its weight. That is 404 bundles per page of 512 rows, whose bytes take 248 cycles to arrive.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..lanes import LANES, split_row
from ..scores import add_sink, cap_scores, rows_seen
from .own_rows import by_kv_head, by_token, sinks_by_kv_head
from .steps import Steps


def _kernel(
    layer_ref,  # [1] scalars: which layer; [2] where there is a window: and how many tokens it has
    length_ref,  # [B]
    count_ref,  # [cores]
    slot_ref,  # [cores * N]
    block_ref,  # [cores * N]
    page_ref,  # [cores * N]
    q_ref,  # [K, X, Q]
    new_ref,  # [K, C], or [K, W, C] of several tokens
    sink_refs,  # [K, X, 1] f32; none where there are no sinks
    cache_refs,  # [K, R, C]; of an int8 cache also the scales, [K, 2, R] f32
    out_ref,  # [K, X, H]
    m_ref,  # [K, X, 1] f32: largest score so far
    l_ref,  # [K, X, 1] f32: sum of exp(score - m)
    acc_ref,  # [K, X, C or H] f32: sum of exp(score - m) v
    *,
    head_dim: int,
    tokens: int,
    max_steps: int,
    soft_cap: float | None,
):
    """One page of one slot. Query x is of token x // G, see `own_rows`; Q and acc's width are H where k and v are whole
    lane tiles, else C: see `split_row`."""
    del page_ref
    if count_ref.shape == (1,):
        step, is_live = pl.program_id(0), True
    else:
        core, i = pl.program_id(0), pl.program_id(1)
        step, is_live = core * max_steps + i, i < count_ref[core]
    cache_ref, scale_ref = cache_refs if len(cache_refs) == 2 else (*cache_refs, None)
    (K, R, _), W, G = cache_ref.shape, tokens, q_ref.shape[1] // tokens
    window = layer_ref[1] if layer_ref.shape == (2,) else None
    has_window = window is not None
    first, length = rows_seen(length_ref[slot_ref[step]], window)
    row = block_ref[step] * R  # the page's first, counted from the slot's
    rows_left = length - row
    scale = head_dim**-0.5
    capped = functools.partial(cap_scores, soft_cap=soft_cap)
    # f32 operands in one bf16 pass would lose 16 bits.
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)

    # Token w sees rows from oldest + w on; where that is not above 0 for any token, by how much is of no matter.
    oldest = 0 if window is None else jnp.maximum(length - window + 1, -W)
    is_first_page = row <= first if has_window else block_ref[step] == 0

    def is_query_before(token: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Whether a row's query is of a token before that of its column."""
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0) < token * G

    def start_from_own_token():
        k_KC, v_KC = split_row(new_ref[...].astype(jnp.float32), head_dim)
        for k in range(K):
            score_G1 = jnp.sum(q_ref[k].astype(jnp.float32) * k_KC[k : k + 1], axis=-1, keepdims=True) * scale
            m_ref[k] = capped(score_G1)
            acc_ref[k] = jnp.broadcast_to(v_KC[k : k + 1], acc_ref.shape[1:])
        l_ref[...] = jnp.ones_like(l_ref)

    def start_from_own_tokens():
        for k in range(K):
            k_WC, v_WC = split_row(new_ref[k], head_dim)
            score_XW = capped(dot(q_ref[k], k_WC, (((1,), (1,)), ((), ()))) * scale)
            token_XW = jax.lax.broadcasted_iota(jnp.int32, score_XW.shape, 1)
            is_seen_XW = jnp.logical_not(is_query_before(token_XW, score_XW.shape))
            if window is not None:
                is_seen_XW &= is_query_before(token_XW + jnp.minimum(window, W), score_XW.shape)
            score_XW = jnp.where(is_seen_XW, score_XW, -jnp.inf)
            m_ref[k] = jnp.max(score_XW, axis=-1, keepdims=True)
            p_XW = jnp.exp(score_XW - m_ref[k])
            l_ref[k] = jnp.sum(p_XW, axis=-1, keepdims=True)
            acc_ref[k] = dot(p_XW.astype(v_WC.dtype), v_WC, (((1,), (0,)), ((), ())))

    @pl.when(is_live & is_first_page)
    def start():
        start_from_own_token() if W == 1 else start_from_own_tokens()
        for sink_ref in sink_refs:
            m_ref[...], l_ref[...], acc_ref[...] = add_sink(m_ref[...], l_ref[...], acc_ref[...], sink_ref[...])

    def is_seen(shape: tuple[int, ...], axis: int) -> jax.Array:
        """Rows along an axis that the first token sees."""
        at = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (at < rows_left) & (at >= first - row) if has_window else at < rows_left

    def is_seen_by_query(shape: tuple[int, ...]) -> jax.Array:
        if not has_window or W == 1:
            return is_seen(shape, 1)
        at = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return is_seen(shape, 1) & is_query_before(at + row - oldest + 1, shape)

    def add_page(whole: bool):
        for k in range(K):
            k_SC, v_SC = split_row(cache_ref[k].astype(q_ref.dtype), head_dim)
            scale_k_1S, scale_v_1S = (scale_ref[k, :1], scale_ref[k, 1:]) if scale_ref is not None else (1.0, None)
            score_XS = capped(dot(q_ref[k], k_SC, (((1,), (1,)), ((), ()))) * (scale_k_1S * scale))
            if not whole:  # rows that are not seen may hold NaN, and 0 * NaN is NaN: mask what p is multiplied by
                score_XS = jnp.where(is_seen_by_query(score_XS.shape), score_XS, -jnp.inf)
                if scale_v_1S is None:
                    v_SC = jnp.where(is_seen(v_SC.shape, 0), v_SC, 0)
                else:
                    scale_v_1S = jnp.where(is_seen(scale_v_1S.shape, 1), scale_v_1S, 0)
            m_X1 = jnp.maximum(m_ref[k], jnp.max(score_XS, axis=-1, keepdims=True))
            decay_X1 = jnp.exp(m_ref[k] - m_X1)
            p_XS = jnp.exp(score_XS - m_X1)
            m_ref[k] = m_X1
            l_ref[k] = l_ref[k] * decay_X1 + jnp.sum(p_XS, axis=-1, keepdims=True)
            p_XS = p_XS if scale_v_1S is None else p_XS * scale_v_1S
            acc_ref[k] = acc_ref[k] * decay_X1 + dot(p_XS.astype(v_SC.dtype), v_SC, (((1,), (0,)), ((), ())))

    is_whole = (rows_left >= R) & (row >= oldest + W - 1) if has_window else rows_left >= R
    pl.when(is_live & is_whole)(functools.partial(add_page, whole=True))
    pl.when(is_live & (rows_left > 0) & jnp.logical_not(is_whole))(functools.partial(add_page, whole=False))

    @pl.when(is_live & (rows_left <= R))
    def finish():
        out_KXC = acc_ref[...] / l_ref[...]
        out_ref[...] = out_KXC[..., -head_dim:].astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames=("soft_cap", "interpret"))
def ragged_attention_tpu(
    q_BWNH: jax.Array,
    new_BWKC: jax.Array,
    cache_LPKRC: jax.Array,
    scale_LPK2R: jax.Array | None,
    layer: jax.Array,
    length_B: jax.Array,
    page_BJ: jax.Array,
    window: jax.Array | None,
    sink_N: jax.Array | None,
    steps: Steps,
    *,
    soft_cap: float | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """`op.ragged_attention` on one chip's heads; `layer` and `window` are i32 scalars. The page table is what `steps`
    were made of, and not read again."""
    (B, W, N, H), (K, R, C) = q_BWNH.shape, cache_LPKRC.shape[2:]
    X, cores = W * N // K, steps.count.size
    max_steps = steps.slot.size // cores
    q_BKXQ = by_kv_head(q_BWNH, K)
    if H % LANES:
        q_BKXQ = jnp.pad(q_BKXQ, ((0, 0), (0, 0), (0, 0), (0, C - H)))
    Q = q_BKXQ.shape[-1]
    # An axis of one token would be padded to a tile of them.
    new, new_block = (new_BWKC[:, 0], (K, C)) if W == 1 else (new_BWKC.swapaxes(1, 2), (K, W, C))
    layer_and_window = layer[None] if window is None else jnp.stack([layer, window])
    # An axis for the cores costs a step 4 bundles, so one core has none.
    grid = (steps.count[0],) if cores == 1 else (cores, jnp.max(steps.count))

    def step_and_scalars(ids):
        *at, layer_ref, length_ref, count_ref, slot_ref, block_ref, page_ref = ids
        del length_ref, count_ref, block_ref
        step = at[0] if cores == 1 else at[0] * max_steps + at[1]
        return step, layer_ref, slot_ref, page_ref

    def page_index(*ids):
        step, layer_ref, _, page_ref = step_and_scalars(ids)
        return layer_ref[0], page_ref[step], 0, 0, 0

    def slot_index(*ids, axes=3):
        step, _, slot_ref, _ = step_and_scalars(ids)
        return slot_ref[step], *axes * (0,)

    # A cache that VMEM could hold would else be moved there whole, rows that no slot uses and all.
    in_hbm = functools.partial(pltpu.with_memory_space_constraint, memory_space=pltpu.HBM)
    cache, cache_specs = (in_hbm(cache_LPKRC),), (pl.BlockSpec((None, None, K, R, C), page_index),)
    if scale_LPK2R is not None:
        cache = (*cache, in_hbm(scale_LPK2R))
        cache_specs = (*cache_specs, pl.BlockSpec((None, None, K, 2, R), page_index))

    sinks = () if sink_N is None else (sinks_by_kv_head(sink_N, K, W)[..., None],)

    out_BKXH = pl.pallas_call(
        functools.partial(_kernel, head_dim=H, tokens=W, max_steps=max_steps, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, K, X, Q), slot_index),
                pl.BlockSpec((None, *new_block), functools.partial(slot_index, axes=len(new_block))),
                tuple(pl.BlockSpec((K, X, 1), lambda *ids: (0, 0, 0)) for _ in sinks),
                cache_specs,
            ],
            out_specs=pl.BlockSpec((None, K, X, H), slot_index),
            scratch_shapes=[
                pltpu.VMEM((K, X, 1), jnp.float32),
                pltpu.VMEM((K, X, 1), jnp.float32),
                pltpu.VMEM((K, X, Q), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, X, H), q_BWNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")[-len(grid) :]),
        cost_estimate=_cost_of_full_slots(q_BWNH, new_BWKC, cache, page_BJ, Q),
        interpret=interpret,
        name=f"ragged_attention_{K}x{H}_page{R}{'' if W == 1 else f'_tokens{W}'}",
    )(layer_and_window, length_B, *steps, q_BKXQ, new, sinks, cache)
    return by_token(out_BKXH, W)


def _cost_of_full_slots(q_BWNH, new_BWKC, cache, page_BJ, q_lanes: int) -> pl.CostEstimate:
    """Lengths are not known when a program is compiled; the pool may hold less than all slots' longest."""
    layers, pages, _, rows, _ = cache[0].shape
    live_pages = min(pages, page_BJ.size)
    scores = live_pages * rows * q_BWNH.shape[1] * q_BWNH.shape[2]
    return pl.CostEstimate(
        flops=4 * scores * q_lanes,
        transcendentals=scores,
        bytes_accessed=sum(leaf.nbytes for leaf in cache) // (layers * pages) * live_pages
        + 2 * q_BWNH.nbytes
        + new_BWKC.nbytes,
    )
