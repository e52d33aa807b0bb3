"""Weights in panels, in plain XLA: the definition.

R rows of activations, I inputs, O outputs, P panels of X = 32 outputs.
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
    """f32 or bf16 [P, I, 32]. In bf16 outputs o and o + 16 are neighbours: a word of 32 bits becomes two floats by a
    shift and a mask."""


@functools.partial(jax.jit, static_argnames="dtype")
def pack(weight_OI: jax.Array, dtype: jnp.dtype) -> Panels:
    """A float weight in panels of f32 or bf16."""
    code_PIX = _in_panels(weight_OI.astype(dtype))
    if dtype == jnp.bfloat16:
        P, I, _ = code_PIX.shape
        code_PIX = code_PIX.reshape(P, I, 2, PANEL // 2).swapaxes(2, 3).reshape(P, I, PANEL)
    return Panels(code_PIX)


def unpack(weight: Panels, outputs: int) -> jax.Array:
    """f32 weight_OI."""
    (P, I, _), code_PIX = weight.code.shape, weight.code.astype(jnp.float32)
    if weight.code.dtype == jnp.bfloat16:
        code_PIX = code_PIX.reshape(P, I, PANEL // 2, 2).swapaxes(2, 3).reshape(P, I, PANEL)
    return code_PIX.swapaxes(1, 2).reshape(P * PANEL, I)[:outputs]


def columns(weight: Panels, output_R: jax.Array) -> jax.Array:
    """f32 [R, I]: of these outputs all their inputs, as an embedding is looked up."""
    lane_R = output_R % PANEL
    if weight.code.dtype == jnp.bfloat16:
        lane_R = lane_R % (PANEL // 2) * 2 + lane_R // (PANEL // 2)
    return weight.code[output_R // PANEL, :, lane_R].astype(jnp.float32)


def panel_matmul_reference(x_RI: jax.Array, weight: Panels, outputs: int) -> jax.Array:
    """`op.panel_matmul`: f32 [R, O]."""
    return jnp.einsum("RI,OI->RO", x_RI, unpack(weight, outputs))


def _in_panels(weight_OI: jax.Array) -> jax.Array:
    O, I = weight_OI.shape
    weight_OI = jnp.pad(weight_OI, ((0, -O % PANEL), (0, 0)))
    return weight_OI.reshape(-1, PANEL, I).swapaxes(1, 2)
