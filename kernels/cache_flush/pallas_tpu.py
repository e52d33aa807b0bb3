"""Flush on TPU: a Mosaic kernel that rewrites, for each slot with new rows, the tiles of rows that they belong to.

A row is less than a tile and cannot be written alone, so a step reads an aligned tile of a slot in a group of layers,
puts the new rows in and writes it back. The cache is input and output in one. The grid is as long as the tiles that
change are many: one or two a slot, none of a slot with nothing to write.

The compiler's schedule for v5e (`kernel_report.py`), the 32 layers of a tile, bf16, H = 128, W = 1, 4 and 8 tokens a
slot: 213, 326 and 181 bundles with 1 kv head, 336, 956 and 446 with 4, while the tiles take 480 and 1,920 cycles there
and back. So HBM is what a flush waits for: with one token, for 96 slots, 31 and 123 us, 246 with 8 heads.

Rows move within float32 vectors, one to a sublane: to put a row into a tile of bf16 as it lies takes 350 and 979
bundles. In int8 a tile has 32 rows: 287, 336 and 412 bundles for 960 cycles with 1 head, 486, 867 and 1,218 for 3,841
with 4. A tile of scales is those of 128 tokens, 1 KiB a head: 180 bundles and 120 cycles with 1 head, 420 and 480 with
4, whatever W.

Rows written alone, by one strided DMA per slot, would take 24 bundles and a sixteenth of those bytes. In this layout
the compiler refuses it in bf16 (offsets must be multiples of 8). It allows it with the heads inside the tokens,
[L, B, S, K, C], but there attention has to pick each head's rows apart: 6,678 bundles for a block of 256 rows of 4
heads (here 513), 4,386 for 8 (817); and with 1 head the whole cache is copied, twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
SUBLANES = 8  # rows of a vector of 32 bits
VMEM_BYTES = 8 * 1024 * 1024  # for tiles, of the 16 MiB that a kernel gets on v5e; new rows take up to half as much
MOST_TOKENS = 8  # of a slot in a step: rows of a tile of floats


def tile_rows(dtype: DTypeLike) -> int:
    """Rows of a tile of the cache in HBM, the least that a DMA can write: T(8,128) in f32, T(8,128)(2,1) in bf16, but
    T(32,128)(4,1) in int8."""
    return 32 if jnp.dtype(dtype).itemsize == 1 else 8


def layer_group(num_layers: int, num_kv_heads: int, row_lanes: int, dtype: DTypeLike, vmem_bytes: int) -> int:
    """Layers per step: the largest divisor of `num_layers` whose tiles, in and out and double-buffered, fit."""
    lanes = -(-row_lanes // LANES) * LANES
    return _largest_divisor(
        num_layers, vmem_bytes // (4 * num_kv_heads * tile_rows(dtype) * lanes * jnp.dtype(dtype).itemsize)
    )


def _largest_divisor(num_layers: int, at_most: int) -> int:
    return max((n for n in range(1, at_most + 1) if num_layers % n == 0), default=1)


class Tiles(NamedTuple):
    """The grid's steps, one for each tile that gets rows, and what none has behind them.

    At least one step: where nothing is to be written, one gives a tile back as it was.
    """

    count: jax.Array
    """steps there are"""
    slot: jax.Array
    """whose new rows"""
    page: jax.Array
    tile: jax.Array
    """of the page"""
    start: jax.Array
    """the row of the tile that the slot's first new row is; below 0 where that is in the tile before"""
    end: jax.Array
    """the row behind the last new one; at or below 0 where there is none, beyond the tile where they go on"""


def tiles_to_write(
    position_B: jax.Array, count_B: jax.Array, page_BJ: jax.Array, *, tokens: int, tile: int, rows: int
) -> Tiles:
    """The tiles that rows [position, position + count) of the slots are in, slot by slot; a slot has at most as many as
    `tokens` rows may touch. What is outside a slot's pages is in none."""
    (B, J), per_slot = page_BJ.shape, (tokens + tile - 2) // tile + 1
    N = B * per_slot
    tile_B1, end_B1 = (position_B // tile)[:, None], (position_B + count_B)[:, None]
    tile_BM = tile_B1 + jnp.arange(per_slot, dtype=jnp.int32)[None, :]
    is_live_BM = (tile_BM * tile < end_B1) & (tile_BM >= 0) & (tile_BM < J * (rows // tile)) & (count_B > 0)[:, None]
    is_page_BMJ = jnp.arange(J, dtype=jnp.int32)[None, None, :] == (tile_BM // (rows // tile))[:, :, None]
    page_BM = jnp.sum(jnp.where(is_page_BMJ, page_BJ[:, None, :], 0), axis=2, dtype=jnp.int32)
    live_N = is_live_BM.reshape(N)
    is_step_NN = live_N[None, :] & ((jnp.cumsum(live_N, dtype=jnp.int32) - 1)[None, :] == jnp.arange(N)[:, None])

    def of_step(value_BM: jax.Array) -> jax.Array:  # a gather, but of one-hot rows: TPUs gather scalars one by one
        value_N = jnp.broadcast_to(value_BM, (B, per_slot)).reshape(N)
        return jnp.sum(jnp.where(is_step_NN, value_N[None, :], 0), axis=1, dtype=jnp.int32)

    slot_B1, start_BM = jnp.arange(B, dtype=jnp.int32)[:, None], position_B[:, None] - tile_BM * tile
    values = (slot_B1, page_BM, tile_BM & (rows // tile - 1), start_BM, start_BM + count_B[:, None])
    return Tiles(jnp.maximum(jnp.sum(live_N, dtype=jnp.int32), 1), *map(of_step, values))


def _write_rows(
    slot_ref,  # [N], scalars
    page_ref,  # [N]
    at_ref,  # [N]
    start_ref,  # [N]
    end_ref,  # [N]
    new_ref,  # [layers, K, W, C]; of one token as `_one_row` takes it
    tile_ref,  # [layers, K, rows, C]
    out_ref,  # [layers, K, rows, C], the tile's own place
    *,
    tokens: int,
):
    """By way of float32, in whose vectors a row moves alone."""
    del page_ref, at_ref
    layers, K, rows, C = tile_ref.shape
    slot, start, end = (ref[pl.program_id(1)] for ref in (slot_ref, start_ref, end_ref))
    row_RC = jax.lax.broadcasted_iota(jnp.int32, (rows, C), 0)
    is_new_RC = (row_RC >= start) & (row_RC < end)
    for layer in range(layers):
        for k in range(K):
            if tokens == 1:
                new_RC = _one_row(new_ref[layer].astype(jnp.float32), k, K, slot, start)
            else:
                new_WC = new_ref[layer, k].astype(jnp.float32)
                new_RC = pltpu.roll(_filled(new_WC, rows), start & (rows - 1), axis=0)
            out_ref[layer, k] = jnp.where(is_new_RC, new_RC.astype(tile_ref.dtype), tile_ref[layer, k])


def _one_row(new: jax.Array, k: int, K: int, slot: jax.Array, row: jax.Array) -> jax.Array:
    """[SUBLANES, C] whose `row` is what head k of a slot gets; `new` is one layer's block, see `_new_rows`."""
    if K > 1:
        return jnp.broadcast_to(new[k : k + 1], (SUBLANES, new.shape[1]))
    return pltpu.roll(new, (row - slot) & (SUBLANES - 1), axis=0)


def _filled(x_WC: jax.Array, rows: int) -> jax.Array:
    W, C = x_WC.shape
    return jnp.concatenate([x_WC, jnp.zeros((rows - W, C), x_WC.dtype)]) if rows > W else x_WC


def as_words(code_LBKWC: jax.Array) -> jax.Array:
    """int8 rows as i32 words of a tile, [L, B, K, W / 4, C]: a word holds a lane of four rows, the earliest lowest; of
    a single row, that row four times."""
    W = code_LBKWC.shape[3]
    row_LBKWC = code_LBKWC.astype(jnp.int32) & 255
    if W == 1:
        return row_LBKWC * 0x01010101
    row_LBKWC = jnp.pad(row_LBKWC, ((0, 0), (0, 0), (0, 0), (0, -W % 4), (0, 0)))
    return functools.reduce(jnp.bitwise_or, (row_LBKWC[:, :, :, i::4] << (8 * i) for i in range(4)))


def _write_codes(
    slot_ref,  # [N], scalars
    page_ref,  # [N]
    at_ref,  # [N]
    start_ref,  # [N]
    end_ref,  # [N]
    new_ref,  # [layers, K, W / 4, C] words; of one token as `_one_row` takes it
    tile_ref,  # [layers, K, 32, C]
    out_ref,  # [layers, K, 32, C], the tile's own place
    *,
    tokens: int,
):
    """By words of four codes, as they lie in a vector; to widen them takes 853 bundles with W = 4, words 336."""
    del page_ref, at_ref
    layers, K, rows, C = tile_ref.shape
    words = rows // 4
    slot, start, end = (ref[pl.program_id(1)] for ref in (slot_ref, start_ref, end_ref))
    first_VC = jax.lax.broadcasted_iota(jnp.int32, (words, C), 0) * 4  # row of a word
    masks = [
        jnp.where((first_VC + i >= start) & (first_VC + i < end), np.uint32(255 << (8 * i)).astype(np.int32), 0)
        for i in range(4)
    ]
    new_mask_VC = functools.reduce(jnp.bitwise_or, masks)
    for layer in range(layers):
        for k in range(K):
            if tokens == 1:
                moved_VC = _one_row(new_ref[layer], k, K, slot, start >> 2)
            else:
                moved_VC = _moved_words(_filled(new_ref[layer, k], words), start)
            tile_VC = pltpu.bitcast(tile_ref[layer, k], jnp.int32)
            out_ref[layer, k] = pltpu.bitcast(tile_VC & ~new_mask_VC | moved_VC & new_mask_VC, jnp.int8)


def _moved_words(new_VC: jax.Array, rows: jax.Array) -> jax.Array:
    """Words of four rows that many rows on: by whole words, and by the rest within them. What is pushed out at the end
    comes around to the beginning."""
    words, bits = new_VC.shape[0], (rows & 3) * 8
    word = (rows >> 2) & (words - 1)
    before_VC = jax.lax.shift_right_logical(pltpu.roll(new_VC, (word + 1) & (words - 1), axis=0), 1)
    return pltpu.roll(new_VC, word, axis=0) << bits | jax.lax.shift_right_logical(before_VC, 31 - bits)


def _write_lanes(
    slot_ref,  # [N], scalars
    page_ref,  # [N]
    at_ref,  # [N]
    start_ref,  # [N]
    end_ref,  # [N]
    new_ref,  # [layers, K, 2, slots * lanes of a slot], of all slots: one's on the lanes would be padded to 128 of them
    tile_ref,  # [layers, K, 2, LANES]
    out_ref,  # [layers, K, 2, LANES], the tile's own place
    *,
    lanes_of_slot: int,
):
    del page_ref, at_ref
    i = pl.program_id(1)
    layers, K, both, lanes = tile_ref.shape
    start, lane = start_ref[i], slot_ref[i] * lanes_of_slot
    lane_2R = jax.lax.broadcasted_iota(jnp.int32, (both, lanes), 1)
    is_new_2R = (lane_2R >= start) & (lane_2R < end_ref[i])
    vector = pl.ds(pl.multiple_of(lane & -LANES, LANES), LANES)
    for layer in range(layers):
        for k in range(K):
            moved = pltpu.roll(new_ref[layer, k, :, vector], (start - lane) & (LANES - 1), axis=1)
            out_ref[layer, k] = jnp.where(is_new_2R, moved, tile_ref[layer, k])


def _new_rows(new_LBKWC: jax.Array, layers: int, tokens: int) -> tuple[jax.Array, pl.BlockSpec]:
    """The new rows, int8's as words, as the kernel takes them, and its block of them: a slot's, of so many layers.

    An axis of one is padded to a tile, and XLA would copy all rows to have it: 6 % of the static cycles of a step of
    llama-2-7b, with 4 heads. So a single token has no axis; nor has a single head, and SUBLANES slots are a block then.
    """
    _, B, K, W, C = new_LBKWC.shape
    if tokens > 1:
        return new_LBKWC, pl.BlockSpec((layers, None, K, W, C), lambda group, i, slot, *_: (group, slot[i], 0, 0, 0))
    if K > 1:
        new_LBKC = new_LBKWC[:, :, :, 0]
        return new_LBKC, pl.BlockSpec((layers, None, K, C), lambda group, i, slot, *_: (group, slot[i], 0, 0))
    new_LBC = jnp.pad(new_LBKWC[:, :, 0, 0], ((0, 0), (0, -B % SUBLANES), (0, 0)))
    return new_LBC, pl.BlockSpec((layers, SUBLANES, C), lambda group, i, slot, *_: (group, slot[i] // SUBLANES, 0))


def cache_flush_tpu(
    cache: jax.Array,
    new: jax.Array,
    position_B: jax.Array,
    count_B: jax.Array,
    page_BJ: jax.Array,
    *,
    row_axis: int,
    cores: int | None = None,
    interpret: pltpu.InterpretParams | bool = False,
    vmem_bytes: int = VMEM_BYTES,
) -> jax.Array:
    """`op.cache_flush` on one chip's heads.

    `cores`: TensorCores that share the layers; None: all of a JAX device (two on v5p), where they divide the layers.
    """
    (L, P, K), (B, W), R = cache.shape[:3], new.shape[1:3], cache.shape[row_axis]
    if cores is None:
        cores = pltpu.get_tpu_info().num_cores
        cores = cores if L % cores == 0 else 1
    if row_axis == 3:
        is_coded = cache.dtype == jnp.int8
        kernel = functools.partial(_write_codes if is_coded else _write_rows, tokens=W)
        tile_shape = (tile_rows(cache.dtype), cache.shape[4])
        layers = layer_group(L // cores, K, cache.shape[4], cache.dtype, vmem_bytes)
        new = new.swapaxes(2, 3)
        new, new_spec = _new_rows(as_words(new) if is_coded else new, layers, tokens=W)
    else:
        lanes_of_slot = 1 if W == 1 else MOST_TOKENS
        kernel, tile_shape = functools.partial(_write_lanes, lanes_of_slot=lanes_of_slot), (cache.shape[3], LANES)
        new = jnp.pad(new.transpose(0, 3, 4, 1, 2), ((0, 0), (0, 0), (0, 0), (0, 0), (0, lanes_of_slot - W)))
        new = new.reshape(*new.shape[:3], B * lanes_of_slot)
        lanes = -(-new.shape[3] // LANES) * LANES
        new = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, lanes - new.shape[3])))
        layer_bytes = 8 * LANES * cache.dtype.itemsize * K * (4 + 2 * lanes // LANES)  # at most 8 rows: one tile
        layers = _largest_divisor(L // cores, vmem_bytes // layer_bytes)
        new_spec = pl.BlockSpec((layers, *new.shape[1:]), lambda group, *_: (group, 0, 0, 0))
    tile = tile_shape[row_axis - 3]

    def tile_index(group, i, slot_ref, page_ref, at_ref, *_):
        return (group, page_ref[i], 0, at_ref[i], 0) if row_axis == 3 else (group, page_ref[i], 0, 0, at_ref[i])

    tile_spec = pl.BlockSpec((layers, None, K, *tile_shape), tile_index)
    count, *scalars = tiles_to_write(position_B, count_B, page_BJ, tokens=W, tile=tile, rows=R)
    flushed = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=(L // layers, count), in_specs=[new_spec, tile_spec], out_specs=tile_spec
        ),
        # Else XLA moves a cache that VMEM could hold there and back, whole, for the few tiles that change.
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        input_output_aliases={6: 0},  # counting the scalars: the cache is the seventh operand
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=new.nbytes + 2 * B * tile * cache.nbytes // (P * R)
        ),
        interpret=interpret,
        name=f"cache_flush_{K}x{'x'.join(map(str, tile_shape))}_layers{layers}{'' if W == 1 else f'_tokens{W}'}",
    )(*scalars, new, cache)
    # libtpu 0.0.42 refuses a program of which this is the only result; a barrier, which costs nothing, hides that.
    return jax.lax.optimization_barrier(flushed)
