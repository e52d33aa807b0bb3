"""Flush on TPU: a Mosaic kernel that rewrites, for each slot, the one tile of rows that holds its position.

A row is less than a tile and cannot be written alone, so a step reads a slot's aligned tile in a group of layers, puts
the new rows in and writes it back. The cache is input and output in one.

The compiler's schedule for v5e (`benchmarks/kernel_report.py`), bf16, H = 128, a slot's 32 layers: 340 bundles with 1
kv head, 964 with 4, 1,151 with 8, while the tiles take 480, 1,920 and 3,841 cycles there and back. So HBM is what a
flush waits for: for 96 slots 31, 123 and 246 us.

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
    layer_bytes = 4 * num_kv_heads * tile_rows(dtype) * lanes * jnp.dtype(dtype).itemsize
    fits = [n for n in range(1, num_layers + 1) if num_layers % n == 0 and n * layer_bytes <= vmem_bytes]
    return max(fits, default=1)


def _kernel(
    position_ref,  # [B], scalars
    new_ref,  # [layers, K, C]
    tile_ref,  # [layers, K, rows, C]
    out_ref,  # [layers, K, rows, C], the tile's own place
    *,
    cache_len: int,
):
    position = position_ref[pl.program_id(1)]
    layers, K, rows, C = tile_ref.shape
    hit = (position >= 0) & (position < cache_len)
    row = jnp.where(hit, position & (rows - 1), -1)
    here_SC = jax.lax.broadcasted_iota(jnp.int32, (rows, C), 0) == row
    for layer in range(layers):
        for k in range(K):
            out_ref[layer, k] = jnp.where(here_SC, new_ref[layer, k : k + 1], tile_ref[layer, k])


def cache_flush_tpu(
    cache_LBKSC: jax.Array,
    new_LBKC: jax.Array,
    position_B: jax.Array,
    *,
    interpret: pltpu.InterpretParams | bool = False,
    vmem_bytes: int = VMEM_BYTES,
) -> jax.Array:
    """`op.cache_flush` on one chip's heads."""
    L, B, K, S, C = cache_LBKSC.shape
    rows = tile_rows(cache_LBKSC.dtype)
    tile_bits = rows.bit_length() - 1
    layers = layer_group(L, K, C, cache_LBKSC.dtype, vmem_bytes)

    def tile_index(group, b, position_ref):
        # A slot with nothing to write gets its nearest tile back as it was.
        # Shifted, since // would look for a sign in each of the pipeline's calls: 50 bundles a step.
        return group, b, 0, jnp.clip(position_ref[b], 0, S - 1) >> tile_bits, 0

    tile = pl.BlockSpec((layers, None, K, rows, C), tile_index)
    return pl.pallas_call(
        functools.partial(_kernel, cache_len=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(L // layers, B),
            in_specs=[pl.BlockSpec((layers, None, K, C), lambda group, b, position_ref: (group, b, 0, 0)), tile],
            out_specs=tile,
        ),
        out_shape=jax.ShapeDtypeStruct(cache_LBKSC.shape, cache_LBKSC.dtype),
        input_output_aliases={2: 0},  # counting the scalars: the cache is the third operand
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=(2 * rows + 1) * new_LBKC.size * cache_LBKSC.dtype.itemsize
        ),
        interpret=interpret,
        name=f"cache_flush_{K}x{C}_layers{layers}",
    )(position_B, new_LBKC, cache_LBKSC)
