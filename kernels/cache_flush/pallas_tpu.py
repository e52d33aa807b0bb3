"""Flush on TPU: a Mosaic kernel that rewrites, for each slot, the one tile of rows that holds its position.

A row is less than a tile and cannot be written alone, so a step reads a slot's aligned tile in a group of layers, puts
the new rows in and writes it back. The cache is input and output in one.

The compiler's schedule for v5e (`kernel_report.py`), bf16, H = 128, the 32 layers of a slot: 340 bundles with 1
kv head, 964 with 4, 1,151 with 8, while the tiles take 480, 1,920 and 3,841 cycles there and back. So HBM is what a
flush waits for: for 96 slots 31, 123 and 246 us.

In int8 a tile has 32 rows: 341 bundles for 960 cycles with 1 head, 902 for 3,841 with 4. A tile of scales is those of
128 tokens, 1 KiB a head: 190 bundles and 120 cycles with 1 head, 426 and 480 with 4.

Rows written alone, by one strided DMA a slot, would take 24 bundles and a sixteenth of those bytes. In this layout the
compiler refuses it in bf16 (offsets must be multiples of 8). It allows it with the heads inside the tokens,
[L, B, S, K, C], but there attention has to pick each head's rows apart: 6,678 bundles for a block of 256 rows of 4
heads (here 513), 4,386 for 8 (817); and with 1 head the whole cache is copied, twice.
"""

import functools

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
    position_ref,  # [B], scalars
    new_ref,  # [layers, K, C]
    tile_ref,  # [layers, K, rows, C]
    out_ref,  # [layers, K, rows, C], the tile's own place
    *,
    cache_len: int,
):
    layers, K, rows, C = tile_ref.shape
    row = _place_in_tile(position_ref[pl.program_id(1)], rows, cache_len)
    here_SC = jax.lax.broadcasted_iota(jnp.int32, (rows, C), 0) == row
    for layer in range(layers):
        for k in range(K):
            out_ref[layer, k] = jnp.where(here_SC, new_ref[layer, k : k + 1], tile_ref[layer, k])


def _write_lane(
    position_ref,  # [B], scalars
    new_ref,  # [layers, K, R, slots], of all slots: one on the lanes would be padded to 128 of them
    tile_ref,  # [layers, K, R, LANES]
    out_ref,  # [layers, K, R, LANES], the tile's own place
    *,
    cache_len: int,
):
    b = pl.program_id(1)
    layers, K, R, lanes = tile_ref.shape
    lane_RS = jax.lax.broadcasted_iota(jnp.int32, (R, lanes), 1)
    here_RS = lane_RS == _place_in_tile(position_ref[b], lanes, cache_len)
    mine_RB = lane_RS == (b & (LANES - 1))
    slots = pl.ds(pl.multiple_of(b & -LANES, LANES), LANES)
    for layer in range(layers):
        for k in range(K):
            new_R1 = jnp.sum(jnp.where(mine_RB, new_ref[layer, k, :, slots], 0), axis=1, keepdims=True)
            out_ref[layer, k] = jnp.where(here_RS, new_R1, tile_ref[layer, k])


def _place_in_tile(position: jax.Array, tile: int, cache_len: int) -> jax.Array:
    """-1 where there is nothing to write."""
    return jnp.where((position >= 0) & (position < cache_len), position & (tile - 1), -1)


def cache_flush_tpu(
    cache: jax.Array,
    new: jax.Array,
    position_B: jax.Array,
    *,
    token_axis: int,
    interpret: pltpu.InterpretParams | bool = False,
    vmem_bytes: int = VMEM_BYTES,
) -> jax.Array:
    """`op.cache_flush` on one chip's heads."""
    L, B, K = cache.shape[:3]
    S = cache.shape[token_axis]
    if token_axis == 3:
        kernel, tile_shape = _write_row, (tile_rows(cache.dtype), cache.shape[4])
        layers = layer_group(L, K, cache.shape[4], cache.dtype, vmem_bytes)
        new_spec = pl.BlockSpec((layers, None, K, cache.shape[4]), lambda group, b, position_ref: (group, b, 0, 0))
    else:
        kernel, tile_shape = _write_lane, (cache.shape[3], LANES)
        slots = -(-B // LANES) * LANES
        new = jnp.pad(new.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, slots - B)))
        layer_bytes = 8 * LANES * cache.dtype.itemsize * K * (4 + 2 * slots // LANES)  # at most 8 rows: one tile
        layers = _largest_divisor(L, vmem_bytes // layer_bytes)
        new_spec = pl.BlockSpec((layers, *new.shape[1:]), lambda group, b, position_ref: (group, 0, 0, 0))
    tile = tile_shape[token_axis - 3]
    tile_bits = tile.bit_length() - 1

    def tile_index(group, b, position_ref):
        # A slot with nothing to write gets its nearest tile back as it was.
        # Shifted, since // would look for a sign in each of the pipeline's calls: 50 bundles a step.
        at = jnp.clip(position_ref[b], 0, S - 1) >> tile_bits
        return (group, b, 0, at, 0) if token_axis == 3 else (group, b, 0, 0, at)

    tile_spec = pl.BlockSpec((layers, None, K, *tile_shape), tile_index)
    flushed = pl.pallas_call(
        functools.partial(kernel, cache_len=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(L // layers, B), in_specs=[new_spec, tile_spec], out_specs=tile_spec
        ),
        # Else XLA moves a cache that VMEM could hold there and back, whole, for the few tiles that change.
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        input_output_aliases={2: 0},  # counting the scalars: the cache is the third operand
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=new.nbytes + 2 * tile * cache.nbytes // S
        ),
        interpret=interpret,
        name=f"cache_flush_{K}x{'x'.join(map(str, tile_shape))}_layers{layers}",
    )(position_B, new, cache)
    # libtpu 0.0.42 refuses a program of which this is the only result; a barrier, which costs nothing, hides that.
    return jax.lax.optimization_barrier(flushed)
