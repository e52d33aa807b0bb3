"""Flush on TPU: a Mosaic kernel that rewrites, for each slot with a new row, the one tile of rows that it belongs to.

A row is less than a tile and cannot be written alone, so a step reads a slot's aligned tile in a group of layers, puts
the new rows in and writes it back. The cache is input and output in one. Slots with nothing to write have no step.

The compiler's schedule for v5e (`kernel_report.py`), bf16, H = 128, the 32 layers of a slot: 340 bundles with 1
kv head, 964 with 4, 1,151 with 8, while the tiles take 480, 1,920 and 3,841 cycles there and back. So HBM is what a
flush waits for: for 96 slots 31, 123 and 246 us.

In int8 a tile has 32 rows: 341 bundles for 960 cycles with 1 head, 902 for 3,841 with 4. A tile of scales is those of
128 tokens, 1 KiB a head: 190 bundles and 120 cycles with 1 head, 426 and 480 with 4.

Rows written alone, by one strided DMA per slot, would take 24 bundles and a sixteenth of those bytes. In this layout
the compiler refuses it in bf16 (offsets must be multiples of 8). It allows it with the heads inside the tokens,
[L, B, S, K, C], but there attention has to pick each head's rows apart: 6,678 bundles for a block of 256 rows of 4
heads (here 513), 4,386 for 8 (817); and with 1 head the whole cache is copied, twice.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
VMEM_BYTES = 8 * 1024 * 1024  # of the 16 MiB that a kernel gets on v5e


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


def _write_row(
    slot_ref,  # [B], scalars
    page_ref,  # [B]
    row_ref,  # [B]
    new_ref,  # [layers, K, C]
    tile_ref,  # [layers, K, rows, C]
    out_ref,  # [layers, K, rows, C], the tile's own place
):
    del slot_ref, page_ref
    layers, K, rows, C = tile_ref.shape
    row = _place_in_tile(row_ref[pl.program_id(1)], rows)
    here_RC = jax.lax.broadcasted_iota(jnp.int32, (rows, C), 0) == row
    for layer in range(layers):
        for k in range(K):
            out_ref[layer, k] = jnp.where(here_RC, new_ref[layer, k : k + 1], tile_ref[layer, k])


def _write_lane(
    slot_ref,  # [B], scalars
    page_ref,  # [B]
    row_ref,  # [B]
    new_ref,  # [layers, K, 2, slots], of all slots: one on the lanes would be padded to 128 of them
    tile_ref,  # [layers, K, 2, LANES]
    out_ref,  # [layers, K, 2, LANES], the tile's own place
):
    del page_ref
    i = pl.program_id(1)
    layers, K, both, lanes = tile_ref.shape
    lane_2R = jax.lax.broadcasted_iota(jnp.int32, (both, lanes), 1)
    here_2R = lane_2R == _place_in_tile(row_ref[i], lanes)
    slot = slot_ref[i]
    mine_2B = lane_2R == (slot & (LANES - 1))
    slots = pl.ds(pl.multiple_of(slot & -LANES, LANES), LANES)
    for layer in range(layers):
        for k in range(K):
            new_21 = jnp.sum(jnp.where(mine_2B, new_ref[layer, k, :, slots], 0), axis=1, keepdims=True)
            out_ref[layer, k] = jnp.where(here_2R, new_21, tile_ref[layer, k])


def _place_in_tile(row: jax.Array, tile: int) -> jax.Array:
    """-1 where there is nothing to write."""
    return jnp.where(row >= 0, row & (tile - 1), -1)


def slots_to_write(page_B: jax.Array, row_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The grid's steps: i32 (count, slot_B, page_B, row_B), those with a row first, in their order.

    At least one: where no slot has a row to write, one gives a tile back as it was.
    """
    slot_B = jnp.arange(page_B.size, dtype=jnp.int32)
    live_B = row_B >= 0
    place_B = jnp.cumsum(live_B, dtype=jnp.int32) - 1
    is_slot_BB = live_B[None, :] & (place_B[None, :] == slot_B[:, None])

    def of_slot(value_B: jax.Array) -> jax.Array:  # a gather, but of one-hot rows: TPUs gather scalars one by one
        return jnp.sum(jnp.where(is_slot_BB, value_B[None, :], 0), axis=1, dtype=jnp.int32)

    count = jnp.sum(live_B, dtype=jnp.int32)
    row_B = jnp.where(slot_B < count, of_slot(row_B), -1)
    return jnp.maximum(count, 1), of_slot(slot_B), of_slot(page_B), row_B


def _places(position_B: jax.Array, page_BJ: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """i32 (page_B, row_B) of each slot's position; row -1 where there is nothing to write."""
    J = page_BJ.shape[1]
    is_inside_B = (position_B >= 0) & (position_B < J * rows)
    is_page_BJ = jnp.arange(J, dtype=jnp.int32)[None, :] == (position_B // rows)[:, None]
    page_B = jnp.sum(jnp.where(is_page_BJ, page_BJ, 0), axis=1, dtype=jnp.int32)
    return page_B, jnp.where(is_inside_B, position_B % rows, -1)


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
    (L, P, K), B, R = cache.shape[:3], new.shape[1], cache.shape[row_axis]
    if new.shape[2] != 1:
        raise NotImplementedError(f"W={new.shape[2]} tokens per slot")
    new = new[:, :, 0]
    page_B, row_B = _places(jnp.where(count_B > 0, position_B, -1), page_BJ, R)
    if cores is None:
        cores = pltpu.get_tpu_info().num_cores
        cores = cores if L % cores == 0 else 1
    if row_axis == 3:
        kernel, tile_shape = _write_row, (tile_rows(cache.dtype), cache.shape[4])
        layers = layer_group(L // cores, K, cache.shape[4], cache.dtype, vmem_bytes)
        new_spec = pl.BlockSpec(
            (layers, None, K, cache.shape[4]), lambda group, i, slot_ref, *_: (group, slot_ref[i], 0, 0)
        )
    else:
        kernel, tile_shape = _write_lane, (cache.shape[3], LANES)
        slots = -(-B // LANES) * LANES
        new = jnp.pad(new.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, slots - B)))
        layer_bytes = 8 * LANES * cache.dtype.itemsize * K * (4 + 2 * slots // LANES)  # at most 8 rows: one tile
        layers = _largest_divisor(L // cores, vmem_bytes // layer_bytes)
        new_spec = pl.BlockSpec((layers, *new.shape[1:]), lambda group, *_: (group, 0, 0, 0))
    tile = tile_shape[row_axis - 3]
    tile_bits = tile.bit_length() - 1

    def tile_index(group, i, slot_ref, page_ref, row_ref):
        # Shifted, since // would look for a sign in each of the pipeline's calls: 50 bundles a step.
        at = jnp.maximum(row_ref[i], 0) >> tile_bits
        return (group, page_ref[i], 0, at, 0) if row_axis == 3 else (group, page_ref[i], 0, 0, at)

    tile_spec = pl.BlockSpec((layers, None, K, *tile_shape), tile_index)
    count, *scalars = slots_to_write(page_B, row_B)
    flushed = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(L // layers, count), in_specs=[new_spec, tile_spec], out_specs=tile_spec
        ),
        # Else XLA moves a cache that VMEM could hold there and back, whole, for the few tiles that change.
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        input_output_aliases={4: 0},  # counting the scalars: the cache is the fifth operand
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=new.nbytes + 2 * B * tile * cache.nbytes // (P * R)
        ),
        interpret=interpret,
        name=f"cache_flush_{K}x{'x'.join(map(str, tile_shape))}_layers{layers}",
    )(*scalars, new, cache)
    # libtpu 0.0.42 refuses a program of which this is the only result; a barrier, which costs nothing, hides that.
    return jax.lax.optimization_barrier(flushed)
