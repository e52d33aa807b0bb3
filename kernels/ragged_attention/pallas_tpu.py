"""Decode attention on TPU: a Mosaic kernel that streams the live blocks of the cache through VMEM.

The grid is (slot, block of rows); one step sees the rows of all kv heads that the chip holds. The pipeline fetches a
block only when its index differs from the step before: `cache_index` repeats itself past a slot's length and for dead
slots, so that nothing is read there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .block_sizes import LANES, block_size


def last_live_block(length_B: jax.Array, block: int, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Where each slot's reading ends: i32 (slot_B, block_B).

    A live slot's own last block. For a dead one (length 0) what the pipeline holds by then: the last block of the live
    slot before it; before the first live slot, that slot's first block, which is wanted next.

    Counting blocks through all slots makes this a running maximum, most of which XLA moves out of a scan over layers.
    """
    num_slots = length_B.shape[0]
    start_B = num_blocks * jnp.arange(num_slots, dtype=jnp.int32)
    last_B = start_B + jnp.minimum((length_B - 1) // block, num_blocks - 1)
    first_live = jnp.min(start_B, where=length_B > 0, initial=num_blocks * (num_slots - 1))
    source_B = jnp.maximum(jax.lax.cummax(jnp.where(length_B > 0, last_B, -1)), first_live)
    return source_B // num_blocks, source_B % num_blocks


def cache_index(b, s, layer_ref, length_ref, source_ref, block_ref):
    """The cache block of grid step (slot b, block s), as indices into [L, B, K, S, C] in units of blocks."""
    last = block_ref[b]
    return layer_ref[0], source_ref[b], 0, jnp.where(length_ref[b] > 0, jnp.minimum(s, last), last), 0


def _kernel(
    layer_ref,  # [1], scalars
    length_ref,  # [B]
    source_ref,  # [B]
    block_ref,  # [B]
    q_ref,  # [K, G, Q]
    new_ref,  # [K, C]
    cache_ref,  # [K, block, C]
    out_ref,  # [K, G, H]
    m_ref,  # [K, G, 1] f32: largest score so far
    l_ref,  # [K, G, 1] f32: sum of exp(score - m)
    acc_ref,  # [K, G, C or H] f32: sum of exp(score - m) v
    *,
    head_dim: int,
):
    """One block of one slot. Q and acc's width are H where k and v are whole lane tiles, else C: see `_split`."""
    del layer_ref, source_ref, block_ref
    b, s = pl.program_id(0), pl.program_id(1)
    K, block, _ = cache_ref.shape
    length = length_ref[b]
    scale = head_dim**-0.5
    # f32 operands in one bf16 pass would lose 16 bits.
    precision = jax.lax.Precision.HIGHEST if cache_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)

    @pl.when(s == 0)
    def start_from_new_token():
        k_KC, v_KC = _split(new_ref[...].astype(jnp.float32), head_dim)
        for k in range(K):
            m_ref[k] = jnp.sum(q_ref[k].astype(jnp.float32) * k_KC[k : k + 1], axis=-1, keepdims=True) * scale
            acc_ref[k] = jnp.broadcast_to(v_KC[k : k + 1], acc_ref.shape[1:])
        l_ref[...] = jnp.ones_like(l_ref)

    def add_block(whole: bool):
        rows_left = length - s * block
        for k in range(K):
            k_SC, v_SC = _split(cache_ref[k], head_dim)
            score_GS = dot(q_ref[k], k_SC, (((1,), (1,)), ((), ()))) * scale
            if not whole:  # rows past the length may hold NaN, and 0 * NaN is NaN: mask v as well
                score_GS = jnp.where(
                    jax.lax.broadcasted_iota(jnp.int32, score_GS.shape, 1) < rows_left, score_GS, -jnp.inf
                )
                v_SC = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v_SC.shape, 0) < rows_left, v_SC, 0)
            m_G1 = jnp.maximum(m_ref[k], jnp.max(score_GS, axis=-1, keepdims=True))
            decay_G1 = jnp.exp(m_ref[k] - m_G1)
            p_GS = jnp.exp(score_GS - m_G1)
            m_ref[k] = m_G1
            l_ref[k] = l_ref[k] * decay_G1 + jnp.sum(p_GS, axis=-1, keepdims=True)
            acc_ref[k] = acc_ref[k] * decay_G1 + dot(p_GS.astype(v_SC.dtype), v_SC, (((1,), (0,)), ((), ())))

    pl.when((s + 1) * block <= length)(functools.partial(add_block, whole=True))
    pl.when((s * block < length) & (length < (s + 1) * block))(functools.partial(add_block, whole=False))

    @pl.when(s == pl.num_programs(1) - 1)
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


def ragged_attention_tpu(
    q_BNH: jax.Array,
    new_BKC: jax.Array,
    cache_LBKSC: jax.Array,
    layer: jax.Array,
    length_B: jax.Array,
    *,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """`op.ragged_attention` on one chip's heads; `layer` is an i32 scalar."""
    (B, N, H), (K, S, C) = q_BNH.shape, cache_LBKSC.shape[2:]
    G, block = N // K, block_size(K, H, S, cache_LBKSC.dtype)
    q_BKGQ = q_BNH.reshape(B, K, G, H)
    if H % LANES:
        q_BKGQ = jnp.pad(q_BKGQ, ((0, 0), (0, 0), (0, 0), (0, C - H)))
    Q = q_BKGQ.shape[-1]

    def slot_index(b, s, *scalars):
        return b, 0, 0, 0

    out_BKGH = pl.pallas_call(
        functools.partial(_kernel, head_dim=H),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, S // block),
            in_specs=[
                pl.BlockSpec((None, K, G, Q), slot_index),
                pl.BlockSpec((None, K, C), lambda b, s, *scalars: (b, 0, 0)),
                pl.BlockSpec((None, None, K, block, C), cache_index),
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
            bytes_accessed=(B * K * S * C + 2 * q_BNH.size + new_BKC.size) * cache_LBKSC.dtype.itemsize,
        ),
        interpret=interpret,
        name=f"ragged_attention_{K}x{H}_block{block}",
    )(layer[None], length_B, *last_live_block(length_B, block, S // block), q_BKGQ, new_BKC, cache_LBKSC)
    return out_BKGH.reshape(B, N, H)
