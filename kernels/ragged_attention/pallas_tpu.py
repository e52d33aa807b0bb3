"""Decode attention on TPU: a Mosaic kernel that streams the live pages of the cache through VMEM.

One step sees one page of one slot, of all kv heads that the chip holds: in one layer a page is one run of memory, so
one DMA. The grid is as long as the slots' live pages are many, its size known only at run time: `live_steps` lists
them. The pipeline fetches a page only when its index differs from the step before, so a slot without rows, which has a
step for its answer, repeats its neighbour's.

The compiler's schedule for v5e (`kernel_report.py`) with 1 kv head, H = 128, bf16 and pages of 512 rows, which take 480
cycles to arrive from HBM: a whole page's step issues 286 bundles, one a cycle. Inside the whole step it is 215, as XLA
hands q and the new rows over in VMEM there. Several pages a step, in one update of the softmax, cost more than one
page of their size: 341 bundles for two of 256 rows. So a page is what a step reads.

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
from .steps import Steps


def _kernel(
    layer_ref,  # [1] scalars: which layer; [2] where there is a window: and how many tokens it has
    length_ref,  # [B]
    count_ref,  # [cores]
    slot_ref,  # [cores * N]
    block_ref,  # [cores * N]
    page_ref,  # [cores * N]
    q_ref,  # [K, G, Q]
    new_ref,  # [K, C]
    sink_refs,  # [K, G, 1] f32; none where there are no sinks
    cache_refs,  # [K, R, C]; of an int8 cache also the scales, [K, 2, R] f32
    out_ref,  # [K, G, H]
    m_ref,  # [K, G, 1] f32: largest score so far
    l_ref,  # [K, G, 1] f32: sum of exp(score - m)
    acc_ref,  # [K, G, C or H] f32: sum of exp(score - m) v
    *,
    head_dim: int,
    max_steps: int,
    soft_cap: float | None,
):
    """One page of one slot. Q and acc's width are H where k and v are whole lane tiles, else C: see `split_row`."""
    del page_ref
    if count_ref.shape == (1,):
        step, is_live = pl.program_id(0), True
    else:
        core, i = pl.program_id(0), pl.program_id(1)
        step, is_live = core * max_steps + i, i < count_ref[core]
    cache_ref, scale_ref = cache_refs if len(cache_refs) == 2 else (*cache_refs, None)
    K, R, _ = cache_ref.shape
    has_window = layer_ref.shape == (2,)
    first, length = rows_seen(length_ref[slot_ref[step]], layer_ref[1] if has_window else None)
    row = block_ref[step] * R  # the page's first, counted from the slot's
    rows_left = length - row
    scale = head_dim**-0.5
    capped = functools.partial(cap_scores, soft_cap=soft_cap)
    # f32 operands in one bf16 pass would lose 16 bits.
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)

    is_first_page = row <= first if has_window else block_ref[step] == 0

    @pl.when(is_live & is_first_page)
    def start_from_new_token():
        k_KC, v_KC = split_row(new_ref[...].astype(jnp.float32), head_dim)
        for k in range(K):
            score_G1 = jnp.sum(q_ref[k].astype(jnp.float32) * k_KC[k : k + 1], axis=-1, keepdims=True) * scale
            m_ref[k] = capped(score_G1)
            acc_ref[k] = jnp.broadcast_to(v_KC[k : k + 1], acc_ref.shape[1:])
        l_ref[...] = jnp.ones_like(l_ref)
        for sink_ref in sink_refs:
            m_ref[...], l_ref[...], acc_ref[...] = add_sink(m_ref[...], l_ref[...], acc_ref[...], sink_ref[...])

    def is_seen(shape: tuple[int, ...], axis: int) -> jax.Array:
        at = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (at < rows_left) & (at >= first - row) if has_window else at < rows_left

    def add_page(whole: bool):
        for k in range(K):
            k_SC, v_SC = split_row(cache_ref[k].astype(q_ref.dtype), head_dim)
            scale_k_1S, scale_v_1S = (scale_ref[k, :1], scale_ref[k, 1:]) if scale_ref is not None else (1.0, None)
            score_GS = capped(dot(q_ref[k], k_SC, (((1,), (1,)), ((), ()))) * (scale_k_1S * scale))
            if not whole:  # rows that are not seen may hold NaN, and 0 * NaN is NaN: mask what p is multiplied by
                score_GS = jnp.where(is_seen(score_GS.shape, 1), score_GS, -jnp.inf)
                if scale_v_1S is None:
                    v_SC = jnp.where(is_seen(v_SC.shape, 0), v_SC, 0)
                else:
                    scale_v_1S = jnp.where(is_seen(scale_v_1S.shape, 1), scale_v_1S, 0)
            m_G1 = jnp.maximum(m_ref[k], jnp.max(score_GS, axis=-1, keepdims=True))
            decay_G1 = jnp.exp(m_ref[k] - m_G1)
            p_GS = jnp.exp(score_GS - m_G1)
            m_ref[k] = m_G1
            l_ref[k] = l_ref[k] * decay_G1 + jnp.sum(p_GS, axis=-1, keepdims=True)
            p_GS = p_GS if scale_v_1S is None else p_GS * scale_v_1S
            acc_ref[k] = acc_ref[k] * decay_G1 + dot(p_GS.astype(v_SC.dtype), v_SC, (((1,), (0,)), ((), ())))

    is_whole = (rows_left >= R) & (row >= first) if has_window else rows_left >= R
    pl.when(is_live & is_whole)(functools.partial(add_page, whole=True))
    pl.when(is_live & (rows_left > 0) & jnp.logical_not(is_whole))(functools.partial(add_page, whole=False))

    @pl.when(is_live & (rows_left <= R))
    def finish():
        out_KGC = acc_ref[...] / l_ref[...]
        out_ref[...] = out_KGC[..., -head_dim:].astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames=("soft_cap", "interpret"))
def ragged_attention_tpu(
    q_BNH: jax.Array,
    new_BKC: jax.Array,
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
    (B, N, H), (K, R, C) = q_BNH.shape, cache_LPKRC.shape[2:]
    G, cores = N // K, steps.count.size
    max_steps = steps.slot.size // cores
    q_BKGQ = q_BNH.reshape(B, K, G, H)
    if H % LANES:
        q_BKGQ = jnp.pad(q_BKGQ, ((0, 0), (0, 0), (0, 0), (0, C - H)))
    Q = q_BKGQ.shape[-1]
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

    def slot_index(*ids):
        step, _, slot_ref, _ = step_and_scalars(ids)
        return slot_ref[step], 0, 0, 0

    # A cache that VMEM could hold would else be moved there whole, rows that no slot uses and all.
    in_hbm = functools.partial(pltpu.with_memory_space_constraint, memory_space=pltpu.HBM)
    cache, cache_specs = (in_hbm(cache_LPKRC),), (pl.BlockSpec((None, None, K, R, C), page_index),)
    if scale_LPK2R is not None:
        cache = (*cache, in_hbm(scale_LPK2R))
        cache_specs = (*cache_specs, pl.BlockSpec((None, None, K, 2, R), page_index))

    sinks = () if sink_N is None else (sink_N.reshape(K, G, 1),)

    out_BKGH = pl.pallas_call(
        functools.partial(_kernel, head_dim=H, max_steps=max_steps, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, K, G, Q), slot_index),
                pl.BlockSpec((None, K, C), lambda *ids: slot_index(*ids)[:3]),
                tuple(pl.BlockSpec((K, G, 1), lambda *ids: (0, 0, 0)) for _ in sinks),
                cache_specs,
            ],
            out_specs=pl.BlockSpec((None, K, G, H), slot_index),
            scratch_shapes=[
                pltpu.VMEM((K, G, 1), jnp.float32),
                pltpu.VMEM((K, G, 1), jnp.float32),
                pltpu.VMEM((K, G, Q), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, G, H), q_BNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")[-len(grid) :]),
        cost_estimate=_cost_of_full_slots(q_BNH, new_BKC, cache, page_BJ, Q),
        interpret=interpret,
        name=f"ragged_attention_{K}x{H}_page{R}",
    )(layer_and_window, length_B, *steps, q_BKGQ, new_BKC, sinks, cache)
    return out_BKGH.reshape(B, N, H)


def _cost_of_full_slots(q_BNH, new_BKC, cache, page_BJ, q_lanes: int) -> pl.CostEstimate:
    """Lengths are not known when a program is compiled; the pool may hold less than all slots' longest."""
    layers, pages, _, rows, _ = cache[0].shape
    live_pages = min(pages, page_BJ.size)
    scores = live_pages * rows * q_BNH.shape[1]
    return pl.CostEstimate(
        flops=4 * scores * q_lanes,
        transcendentals=scores,
        bytes_accessed=sum(leaf.nbytes for leaf in cache) // (layers * pages) * live_pages
        + 2 * q_BNH.nbytes
        + new_BKC.nbytes,
    )
