"""Weights in panels, in plain XLA: the definition.

R rows of activations, I inputs, O outputs, P panels of X = 32 outputs, Q blocks of inputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

PANEL = 32
"""Outputs of a panel: two vectors of the widest registers. Narrower ones take a panel in parts."""


class Panels(NamedTuple):
    """A weight whose outputs lie side by side by 32, input after input: a product reads it from end to end, and has all
    that one input adds to 32 outputs in a few registers. Outputs are filled up to whole panels with zeros."""

    code: jax.Array
    """The weight itself: f32 or f16 [P, I, 32], or bf16 [P, I / 2, 32, 2], where two inputs of an output are
    neighbours, as dot products take them, and a zero fills an odd number of inputs up. Or its codes: i8 [P, I, 32]; or
    i8 [P, I / 2, 32] with two inputs' codes in a byte, each from 0 to 15, the earlier input's in the low half; or
    float8_e4m3fn [P, I, 32], whose scales are blocks' and which has no NaN: whoever loads weights refuses it."""
    scale: jax.Array | None = None
    """f32 [P, 32], an output's, of i8 codes of 8 bits; or f32 or f16 [P, Q, 32], a block's. In f32 weight =
    code * scale + offset, rounded once where f32 holds code * scale."""
    offset: jax.Array | None = None
    """[P, Q, 32] of the scale's type; of i8 codes in blocks: of 8 bits where there is one, of 4 bits without a table"""
    table: jax.Array | None = None
    """i8 [16], what codes of 4 bits stand for, instead of an offset"""


@functools.partial(jax.jit, static_argnames="dtype")
def pack(weight_OI: jax.Array, dtype: jnp.dtype) -> Panels:
    """A float weight, as f32, bf16 or f16."""
    code_PIX = _in_panels(weight_OI.astype(dtype).T)
    if dtype != jnp.bfloat16:
        return Panels(code_PIX)
    code_PIX = jnp.pad(code_PIX, ((0, 0), (0, code_PIX.shape[1] % 2), (0, 0)))
    return Panels(code_PIX.reshape(len(code_PIX), -1, 2, PANEL).swapaxes(2, 3))


@jax.jit
def pack_int8(code_OI: jax.Array, scale_O: jax.Array) -> Panels:
    """Codes of 8 bits with a scale for each output."""
    return Panels(_in_panels(code_OI.T), _in_panels(scale_O[None])[:, 0])


@jax.jit
def pack_int4(packed: jax.Array, scale_QO: jax.Array, offset_QO: jax.Array) -> Panels:
    """The arrays of a `Blockwise` weight of f32: packed i8 [I / 2, O], whose codes are from -8 to 7."""
    signs = jnp.int8(-0x78)  # 0x88, the bit of both codes: without it they are 8 more
    return Panels(*map(_in_panels, (packed ^ signs, scale_QO, offset_QO - 8 * scale_QO)))


@functools.partial(jax.jit, static_argnames=("bits", "table"))
def pack_blocks(
    code_OI: jax.Array, scale_OQ: jax.Array, offset_OQ: jax.Array | None, bits: int, table: tuple[int, ...] = ()
) -> Panels:
    """Codes i8 or float8_e4m3fn with a scale, and for i8 perhaps an offset, for each block of I / Q inputs.

    Args:
        bits: 8, or 4 for codes from 0 to 15, which have an offset or a table.
        table: what 0 to 15 stand for, from -128 to 127; empty: themselves.
    """
    code_IO = code_OI.T
    if bits == 4:
        code_IO = code_IO[::2] | code_IO[1::2] << 4
    offset = None if offset_OQ is None else _in_panels(offset_OQ.T)
    return Panels(_in_panels(code_IO), _in_panels(scale_OQ.T), offset, jnp.int8(table) if table else None)


def unpack(weight: Panels, outputs: int, inputs: int) -> jax.Array:
    """f32 weight_OI."""
    code_PIX, scale, offset = _codes(weight, inputs), weight.scale, weight.offset
    if scale is not None:
        code_PIX = code_PIX * _of_inputs(scale if scale.ndim == 3 else scale[:, None], inputs)
    if offset is not None:
        code_PIX = code_PIX + _of_inputs(offset, inputs)
    return code_PIX.swapaxes(1, 2).reshape(-1, inputs)[:outputs]


def columns(weight: Panels, output_R: jax.Array, inputs: int) -> jax.Array:
    """f32 [R, I]: of these outputs all their inputs, as an embedding is looked up; as `unpack`."""
    panel_R, lane_R = output_R // PANEL, output_R % PANEL
    code, *grids, table = weight
    scale, offset = (None if grid is None else grid[panel_R, ..., lane_R][..., None] for grid in grids)
    return unpack(Panels(code[panel_R, :, lane_R][:, :, None], scale, offset, table), len(output_R), inputs)


def rounded(x: jax.Array) -> jax.Array:
    """f32 values as bfloat16 has them, to nearest, ties to even."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def panel_matmul_reference(
    x_RI: jax.Array, weight: Panels, outputs: int, is_live_R: jax.Array | None = None
) -> jax.Array:
    """`op.panel_matmul`: f32 [R, O]."""
    if x_RI.dtype == jnp.bfloat16:
        x_RI = rounded(x_RI.astype(jnp.float32))  # said again, for XLA leaves a rounding out that it sees widened
    out_RO = jnp.einsum("RI,OI->RO", x_RI, unpack(weight, outputs, x_RI.shape[1]))
    return out_RO if is_live_R is None else jnp.where(is_live_R[:, None], out_RO, 0)


def _codes(weight: Panels, inputs: int) -> jax.Array:
    """f32 [P, I, X] of a weight's codes, or what they stand for, or of the weight itself."""
    code, table = weight.code, weight.table
    if code.ndim == 4:
        return code.swapaxes(2, 3).reshape(len(code), -1, code.shape[2])[:, :inputs].astype(jnp.float32)
    if code.shape[1] == inputs:
        return code.astype(jnp.float32)
    halves = jnp.stack([code & 15, code >> 4 & 15], axis=2)
    halves = halves if table is None else table[halves]
    return halves.reshape(len(code), inputs, -1).astype(jnp.float32)


def _of_inputs(grid_PQX: jax.Array, inputs: int) -> jax.Array:
    """f32 [P, I, X]: what is each input's, of its block's."""
    return grid_PQX.astype(jnp.float32).repeat(inputs // grid_PQX.shape[1], axis=1)


def _in_panels(leaf_IO: jax.Array) -> jax.Array:
    I, O = leaf_IO.shape
    leaf_IO = jnp.pad(leaf_IO, ((0, 0), (0, -O % PANEL)))
    return leaf_IO.reshape(I, -1, PANEL).swapaxes(0, 1)
