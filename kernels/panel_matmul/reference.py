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
    """f32 [P, I, 32], or bf16 [P, I / 2, 32, 2], the weight itself: in bf16 two inputs of an output are neighbours, as
    dot products take them, and a zero fills an odd number of inputs up. i8 [P, I, 32], its codes. Or i8 [P, I / 2, 32]
    with two inputs' codes in a byte, each in [-8, 7], the earlier input's in the low half."""
    scale: jax.Array | None = None
    """f32: [P, 32] an output's, or [P, Q, 32] a block's of 4-bit codes; weight = code * scale + offset"""
    offset: jax.Array | None = None
    """f32 [P, Q, 32], of 4-bit codes alone"""


@functools.partial(jax.jit, static_argnames="dtype")
def pack(weight_OI: jax.Array, dtype: jnp.dtype) -> Panels:
    """A float weight, as f32 or bf16."""
    code_PIX = _in_panels(weight_OI.astype(dtype).T)
    if dtype != jnp.bfloat16:
        return Panels(code_PIX)
    code_PIX = jnp.pad(code_PIX, ((0, 0), (0, code_PIX.shape[1] % 2), (0, 0)))
    return Panels(code_PIX.reshape(len(code_PIX), -1, 2, PANEL).swapaxes(2, 3))


@jax.jit
def pack_int8(code_OI: jax.Array, scale_O: jax.Array) -> Panels:
    """Codes with a scale for each output."""
    return Panels(_in_panels(code_OI.T), _in_panels(scale_O[None])[:, 0])


@jax.jit
def pack_int4(packed: jax.Array, scale_QO: jax.Array, offset_QO: jax.Array) -> Panels:
    """The arrays of a `Blockwise` weight: packed i8 [I / 2, O]."""
    return Panels(*map(_in_panels, (packed, scale_QO, offset_QO)))


def unpack(weight: Panels, outputs: int) -> jax.Array:
    """f32 weight_OI; of bf16 with the input that was filled up."""
    code_PIX = weight.code.astype(jnp.float32)
    if code_PIX.ndim == 4:
        code_PIX = code_PIX.swapaxes(2, 3).reshape(len(code_PIX), -1, PANEL)
    P, I, X = code_PIX.shape
    if weight.offset is not None and weight.scale is not None:
        low_high = [(weight.code << 4) >> 4, weight.code >> 4]  # of i8 the right shift keeps the sign
        code_PIX = jnp.stack(low_high, axis=2).reshape(P, 2 * I, X).astype(jnp.float32)
        block = 2 * I // weight.scale.shape[1]
        code_PIX = code_PIX * weight.scale.repeat(block, axis=1) + weight.offset.repeat(block, axis=1)
    elif weight.scale is not None:
        code_PIX = code_PIX * weight.scale[:, None]
    return code_PIX.swapaxes(1, 2).reshape(P * X, -1)[:outputs]


def columns(weight: Panels, output_R: jax.Array) -> jax.Array:
    """f32 [R, I]: of these outputs all their inputs, as an embedding is looked up. Not of 4-bit codes; else as
    `unpack`."""
    panel_R, lane_R = output_R // PANEL, output_R % PANEL
    code_RI = weight.code[panel_R, :, lane_R].astype(jnp.float32).reshape(len(output_R), -1)
    return code_RI if weight.scale is None else code_RI * weight.scale[panel_R, lane_R, None]


def rounded(x: jax.Array) -> jax.Array:
    """f32 values as bfloat16 has them, to nearest, ties to even."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def panel_matmul_reference(x_RI: jax.Array, weight: Panels, outputs: int) -> jax.Array:
    """`op.panel_matmul`: f32 [R, O]."""
    if x_RI.dtype == jnp.bfloat16:
        x_RI = rounded(x_RI.astype(jnp.float32))  # said again, for XLA leaves a rounding out that it sees widened
    return jnp.einsum("RI,OI->RO", x_RI, unpack(weight, outputs))


def _in_panels(leaf_IO: jax.Array) -> jax.Array:
    I, O = leaf_IO.shape
    leaf_IO = jnp.pad(leaf_IO, ((0, 0), (0, -O % PANEL)))
    return leaf_IO.reshape(I, -1, PANEL).swapaxes(0, 1)
