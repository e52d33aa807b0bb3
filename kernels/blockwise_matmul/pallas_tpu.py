"""Blockwise int4 on TPU: a Mosaic kernel that unpacks a tile of the weight in VMEM, right before it is multiplied.

XLA's own fusion of the same arithmetic costs 20 to 50 million static cycles where bf16 weights cost 4.1 (v5e; 96
matrices of 4096 x 1792, 64 rows), so it is no option there.

The offsets are not added to the weights, which would be one more operation for each of them, but multiplied with each
block's sum of x: x @ (code * scale + offset) = x @ (code * scale) + blocksum(x) @ offset. The sums are themselves a
matrix product, with ones where a block holds an input, done once and kept for all tiles of outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .reference import Blockwise

LANES, SUBLANES = 128, 8
SCALE_ROWS = 16  # of a tile in bf16, the larger of the two types
INPUTS = 4096  # at most, of a tile, where they can be divided
ROWS = OUTPUTS = 256  # likewise
TILE = 2 << 20  # bytes at most of x, and of the weight unpacked


def _kernel(
    layer_ref,  # [1], scalar
    x_ref,  # [R, I]
    packed_ref,  # [I / 2, O] i8
    scale_ref,  # [Q, O]
    offset_ref,  # [Q, O]
    out_ref,  # [R, O]
    total_ref,  # [R, O] f32: of the inputs' tiles so far
    sum_ref,  # [tiles of inputs, R, Q]: blocks' sums of x
):
    """One tile. It is rounded here: XLA would do it by an operation of its own, for a product of 128 rows and 4,096
    outputs 10.7 thousand static cycles on v5e."""
    del layer_ref
    first_outputs, tile = pl.program_id(2) == 0, pl.program_id(3)
    I, Q = x_ref.shape[1], scale_ref.shape[0]
    block = I // Q
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32, precision=precision)

    @pl.when(first_outputs)
    def sum_blocks():
        input_IQ = jax.lax.broadcasted_iota(jnp.int32, (I, Q), 0)
        start_IQ = jax.lax.broadcasted_iota(jnp.int32, (I, Q), 1) * block
        in_block_IQ = (input_IQ >= start_IQ) & (input_IQ < start_IQ + block)
        sum_ref[tile] = dot(x_ref[...], in_block_IQ.astype(x_ref.dtype)).astype(x_ref.dtype)

    code_IO = pltpu.bitcast(packed_ref[...], jnp.int4).astype(jnp.float32)
    scaled_QiO = code_IO.reshape(Q, block, -1) * scale_ref[...].astype(jnp.float32)[:, None]
    weight_IO = scaled_QiO.reshape(code_IO.shape).astype(x_ref.dtype)
    out_RO = dot(x_ref[...], weight_IO) + dot(sum_ref[tile], offset_ref[...])

    @pl.when(tile == 0)
    def start_total():
        total_ref[...] = out_RO

    @pl.when(tile > 0)
    def add_to_total():
        total_ref[...] += out_RO

    @pl.when(tile == sum_ref.shape[0] - 1)
    def give_answer():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def blockwise_matmul_tpu(
    x_RI: jax.Array, weight: Blockwise, layer: jax.Array, *, interpret: pltpu.InterpretParams | bool = False
) -> jax.Array:
    """`op.blockwise_matmul` on one chip; `layer` is an i32 scalar."""
    (R, I), (Q, O) = x_RI.shape, weight.scale.shape[1:]
    inputs = tile_of(I, SCALE_ROWS * I // Q)
    most = TILE // (inputs * x_RI.dtype.itemsize)
    # The last tile of rows or outputs may reach past the end: what is there is neither used nor written.
    rows, outputs = min(R, ROWS, max(most // 8 * 8, 8)), min(O, OUTPUTS, max(most // LANES * LANES, LANES))
    tiles = pl.cdiv(O, outputs)
    cores = 1 if interpret else pltpu.get_tpu_info().num_cores
    cores = cores if tiles % cores == 0 else 1
    of_weight = lambda core, r, o, i, layer_ref: (layer_ref[0], i, core * (tiles // cores) + o)  # noqa: E731

    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, pl.cdiv(R, rows), tiles // cores, I // inputs),
            in_specs=[
                pl.BlockSpec((rows, inputs), lambda core, r, o, i, layer_ref: (r, i)),
                pl.BlockSpec((None, inputs // 2, outputs), of_weight),
                pl.BlockSpec((None, inputs * Q // I, outputs), of_weight),
                pl.BlockSpec((None, inputs * Q // I, outputs), of_weight),
            ],
            out_specs=pl.BlockSpec((rows, outputs), lambda core, r, o, i, layer_ref: (r, core * (tiles // cores) + o)),
            scratch_shapes=[
                pltpu.VMEM((rows, outputs), jnp.float32),
                pltpu.VMEM((I // inputs, rows, inputs * Q // I), x_RI.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((R, O), x_RI.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * I * O,
            transcendentals=0,
            bytes_accessed=I * O // 2 + 2 * Q * O * x_RI.dtype.itemsize + x_RI.nbytes + R * O * x_RI.dtype.itemsize,
        ),
        interpret=interpret,
        name=f"blockwise_matmul_{I}x{O}",
    )(layer[None], x_RI, *map(_where_it_lies, weight))


def _where_it_lies(stack: jax.Array) -> jax.Array:
    """A stack that stays in HBM: left alone, XLA moves all layers' to VMEM in every layer where it can hold
    them, for llama-3.1-8b on eight v5e the 112 MiB of its down projections.

    One that makes no whole tiles XLA has laid out anew by then, in VMEM if it can, from where it would be sent back.
    """
    is_whole = stack.shape[-1] % LANES == 0 and stack.shape[-2] % SUBLANES == 0
    return pltpu.with_memory_space_constraint(stack, pltpu.HBM) if is_whole else stack


def tile_of(inputs: int, unit: int) -> int:
    """The largest divisor of `inputs` that is a multiple of `unit` and at most INPUTS; all where there is none."""
    fitting = [tile for tile in range(unit, min(inputs, INPUTS) + 1, unit) if inputs % tile == 0]
    return inputs if inputs <= INPUTS or not fitting else fitting[-1]
