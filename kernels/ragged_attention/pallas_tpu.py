"""Decode attention on TPU: a Mosaic kernel that streams the live blocks of the cache through VMEM.

One step sees one block of rows of one slot, of all kv heads that the chip holds. The grid is as long as the slots'
live blocks are many, its size known only at run time: `live_steps` lists them. The pipeline fetches a block only when
its index differs from the step before, so a dead slot, which has a step for its answer, repeats its neighbour's.

The compiler's schedule for v5e (`kernel_report.py`) with 1 kv head, H = 128, bf16 and blocks of 512 rows,
which take 480 cycles to arrive from HBM: a whole block's step issues 301 bundles, one a cycle. The same kernel on a
grid of all (slot, block) pairs, whose index map stands still past a slot's length, issues 278, but also 147 for every
pair that no slot uses: of a slot of 1024 tokens, 220 of 1,450 cycles with S = 2048, 2,000 of 3,200 with S = 8192.

A window is a second border: its steps begin at its first block, which is masked as the last one is. It adds 11 bundles
to a whole block's step, a soft cap 2; a program with neither has nothing of them.

Of an int8 cache a block's codes become bf16 in VMEM. Their scales are one number a row: k's multiplies the row's score,
v's its weight. That is 434 bundles a block of 512 rows, 601 of 1024, whose bytes take 248 and 495 cycles to arrive.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..scores import cap_scores, rows_seen
from .block_sizes import LANES


class Steps(NamedTuple):
    """The grid's steps, a list for each core. The lists stand one behind the other, each as long as any may get, N.

    Where a core has fewer, its last step is repeated.
    """

    count: jax.Array
    """[cores]: steps there are"""
    slot: jax.Array
    """[cores * N]: whose query and answer"""
    source: jax.Array
    """[cores * N]: the slot whose rows are in VMEM; another one, if this one is dead"""
    block: jax.Array
    """[cores * N]: which of its blocks of rows"""


def live_steps(
    length_B: jax.Array, window: jax.Array | None, cache_len: int, block: int, cores: int | None = None
) -> Steps:
    """Every block that holds a row to be seen, slot by slot, and one step for each slot without any. Core b % cores
    has slot b.

    Args:
        window: i32 scalar, as in `op.ragged_attention`.
        block: rows, a divisor of `cache_len`.
        cores: TensorCores that share the slots; None: all of a JAX device (two on v5p), where they divide the slots.
    """
    if cores is None:
        cores = pltpu.get_tpu_info().num_cores
        cores = cores if length_B.shape[0] % cores == 0 else 1
    of_cores = jax.vmap(functools.partial(_steps_of_core, block=block, num_blocks=cache_len // block))
    first_B, end_B = rows_seen(length_B, window)
    first_B = jnp.broadcast_to(jnp.asarray(first_B, jnp.int32), length_B.shape)
    count_C, slot_CN, source_CN, block_CN = of_cores(first_B.reshape(-1, cores).T, end_B.reshape(-1, cores).T)
    core_C1 = jnp.arange(cores, dtype=jnp.int32)[:, None]
    return Steps(count_C, (slot_CN * cores + core_C1).ravel(), (source_CN * cores + core_C1).ravel(), block_CN.ravel())


def _steps_of_core(first_B, length_B, *, block, num_blocks):
    """`live_steps` of the slots of one core, numbered from 0; rows [first, length) are seen."""
    num_slots = length_B.shape[0]
    first_block_B = first_B // block
    count_B = jnp.clip((length_B + block - 1) // block - first_block_B, 1, num_blocks)
    end_B = jnp.cumsum(count_B, dtype=jnp.int32)
    start_B = end_B - count_B
    source_B, last_B = last_live_block(first_block_B, length_B, block, num_blocks)

    step_N = jnp.minimum(jnp.arange(num_slots * num_blocks, dtype=jnp.int32), end_B[-1] - 1)
    is_slot_NB = (start_B[None, :] <= step_N[:, None]) & (step_N[:, None] < end_B[None, :])

    def of_slot(value_B: jax.Array) -> jax.Array:  # a gather, but of one-hot rows: TPUs gather scalars one by one
        return jnp.sum(jnp.where(is_slot_NB, value_B[None, :], 0), axis=1, dtype=jnp.int32)

    # A live slot's blocks count up from its first, a dead one's single step stays at `last`.
    zero_B = jnp.where(length_B > 0, start_B - first_block_B, start_B - last_B)
    return (
        end_B[-1],
        of_slot(jnp.arange(num_slots, dtype=jnp.int32)),
        of_slot(source_B),
        step_N - of_slot(zero_B),
    )


def last_live_block(
    first_block_B: jax.Array, length_B: jax.Array, block: int, num_blocks: int
) -> tuple[jax.Array, jax.Array]:
    """Where each slot's reading ends: i32 (slot_B, block_B).

    A live slot's own last block. For a dead one (length 0) what the pipeline holds by then: the last block of the live
    slot before it; before the first live slot, that slot's first block, which is wanted next.
    """
    num_slots = length_B.shape[0]
    start_B = num_blocks * jnp.arange(num_slots, dtype=jnp.int32)
    last_B = start_B + jnp.minimum((length_B - 1) // block, num_blocks - 1)
    first_live = jnp.min(start_B + first_block_B, where=length_B > 0, initial=num_blocks * num_slots - 1)
    source_B = jnp.maximum(jax.lax.cummax(jnp.where(length_B > 0, last_B, -1)), first_live)
    return source_B // num_blocks, source_B % num_blocks


def _kernel(
    layer_ref,  # [1] scalars: which layer; [2] where there is a window: and how many tokens it has
    length_ref,  # [B]
    count_ref,  # [cores]
    slot_ref,  # [cores * N]
    source_ref,  # [cores * N]
    block_ref,  # [cores * N]
    q_ref,  # [K, G, Q]
    new_ref,  # [K, C]
    cache_refs,  # [K, block, C]; of an int8 cache also the scales, [K, 2, block] f32
    out_ref,  # [K, G, H]
    m_ref,  # [K, G, 1] f32: largest score so far
    l_ref,  # [K, G, 1] f32: sum of exp(score - m)
    acc_ref,  # [K, G, C or H] f32: sum of exp(score - m) v
    *,
    head_dim: int,
    max_steps: int,
    soft_cap: float | None,
):
    """One block of one slot. Q and acc's width are H where k and v are whole lane tiles, else C: see `_split`."""
    del source_ref
    core, i = pl.program_id(0), pl.program_id(1)
    step = core * max_steps + i
    cache_ref, scale_ref = cache_refs if len(cache_refs) == 2 else (*cache_refs, None)
    K, block, _ = cache_ref.shape
    has_window = layer_ref.shape == (2,)
    first, length = rows_seen(length_ref[slot_ref[step]], layer_ref[1] if has_window else None)
    row = block_ref[step] * block  # the block's first
    rows_left = length - row
    is_live = i < count_ref[core]
    scale = head_dim**-0.5
    capped = functools.partial(cap_scores, soft_cap=soft_cap)
    # f32 operands in one bf16 pass would lose 16 bits.
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)

    is_first_block = row <= first if has_window else block_ref[step] == 0

    @pl.when(is_live & (is_first_block | (length == 0)))
    def start_from_new_token():
        k_KC, v_KC = _split(new_ref[...].astype(jnp.float32), head_dim)
        for k in range(K):
            score_G1 = jnp.sum(q_ref[k].astype(jnp.float32) * k_KC[k : k + 1], axis=-1, keepdims=True) * scale
            m_ref[k] = capped(score_G1)
            acc_ref[k] = jnp.broadcast_to(v_KC[k : k + 1], acc_ref.shape[1:])
        l_ref[...] = jnp.ones_like(l_ref)

    def is_seen(shape: tuple[int, ...], axis: int) -> jax.Array:
        at = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (at < rows_left) & (at >= first - row) if has_window else at < rows_left

    def add_block(whole: bool):
        for k in range(K):
            k_SC, v_SC = _split(cache_ref[k].astype(q_ref.dtype), head_dim)
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

    is_whole = (rows_left >= block) & (row >= first) if has_window else rows_left >= block
    pl.when(is_live & is_whole)(functools.partial(add_block, whole=True))
    pl.when(is_live & (rows_left > 0) & jnp.logical_not(is_whole))(functools.partial(add_block, whole=False))

    @pl.when(is_live & (rows_left <= block))
    def finish():
        out_KGC = acc_ref[...] / l_ref[...]
        out_ref[...] = out_KGC[..., -head_dim:].astype(out_ref.dtype)


def _split(rows: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Rows [..., C] as (k, v), cut only at a border of lane tiles.

    With H = 64 the border falls inside a tile. There the rows stand for both: q is padded with zeros, so that q . row
    is q . k, and of p @ row the last H lanes are p @ v.
    """
    if head_dim % LANES:
        return rows, rows
    return rows[..., :head_dim], rows[..., head_dim:]


@functools.partial(jax.jit, static_argnames=("soft_cap", "interpret"))
def ragged_attention_tpu(
    q_BNH: jax.Array,
    new_BKC: jax.Array,
    cache_LBKSC: jax.Array,
    scale_LBK2S: jax.Array | None,
    layer: jax.Array,
    length_B: jax.Array,
    window: jax.Array | None,
    steps: Steps,
    *,
    soft_cap: float | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """`op.ragged_attention` on one chip's heads; `layer` and `window` are i32 scalars. The block's rows are those of
    `steps`."""
    (B, N, H), (K, S, C) = q_BNH.shape, cache_LBKSC.shape[2:]
    G, block, cores = N // K, B * S // steps.slot.size, steps.count.size
    max_steps = steps.slot.size // cores
    q_BKGQ = q_BNH.reshape(B, K, G, H)
    if H % LANES:
        q_BKGQ = jnp.pad(q_BKGQ, ((0, 0), (0, 0), (0, 0), (0, C - H)))
    Q = q_BKGQ.shape[-1]
    layer_and_window = layer[None] if window is None else jnp.stack([layer, window])

    def cache_index(core, i, layer_ref, length_ref, count_ref, slot_ref, source_ref, block_ref):
        del length_ref, count_ref, slot_ref
        step = core * max_steps + i
        return layer_ref[0], source_ref[step], 0, block_ref[step], 0

    def scale_index(*ids):
        layer, source, _, block, _ = cache_index(*ids)
        return layer, source, 0, 0, block

    def slot_index(core, i, layer_ref, length_ref, count_ref, slot_ref, *others):
        del layer_ref, length_ref, count_ref, others
        return slot_ref[core * max_steps + i], 0, 0, 0

    # A cache that VMEM could hold would else be moved there whole, rows that no slot uses and all.
    in_hbm = functools.partial(pltpu.with_memory_space_constraint, memory_space=pltpu.HBM)
    cache, cache_specs = (in_hbm(cache_LBKSC),), (pl.BlockSpec((None, None, K, block, C), cache_index),)
    if scale_LBK2S is not None:
        cache = (*cache, in_hbm(scale_LBK2S))
        cache_specs = (*cache_specs, pl.BlockSpec((None, None, K, 2, block), scale_index))

    out_BKGH = pl.pallas_call(
        functools.partial(_kernel, head_dim=H, max_steps=max_steps, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, jnp.max(steps.count)),
            in_specs=[
                pl.BlockSpec((None, K, G, Q), slot_index),
                pl.BlockSpec((None, K, C), lambda *ids: slot_index(*ids)[:3]),
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
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # of full slots: lengths are not known here
            flops=4 * B * N * S * Q,
            transcendentals=B * N * S,
            bytes_accessed=sum(leaf.nbytes for leaf in cache) // cache_LBKSC.shape[0]
            + 2 * q_BNH.nbytes
            + new_BKC.nbytes,
        ),
        interpret=interpret,
        name=f"ragged_attention_{K}x{H}_block{block}",
    )(layer_and_window, length_B, *steps, q_BKGQ, new_BKC, cache)
    return out_BKGH.reshape(B, N, H)
