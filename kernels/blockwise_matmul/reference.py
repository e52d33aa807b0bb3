"""Blockwise int4 in plain XLA: the definition, and what runs on CPU and GPU.

R rows of activations, I inputs, O outputs, Q blocks of inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blockwise(NamedTuple):
    """A weight of 4-bit codes: weight[i, o] = code[i, o] * scale[q, o] + offset[q, o], where block q holds input i.

    May have a leading axis L, a stack of layers. It is stored as it is multiplied, inputs first: so a TPU broadcasts a
    scale along sublanes, which is free.
    """

    packed: jax.Array
    """i8 [..., I / 2, O]: row r holds code 2 r in its low half and code 2 r + 1 in its high half, each in [-8, 7]"""
    scale: jax.Array
    """[..., Q, O], the activations' dtype"""
    offset: jax.Array
    """[..., Q, O], likewise"""


def unpack(packed: jax.Array) -> jax.Array:
    """Codes i8 [..., I, O] of packed ones."""
    pairs = jnp.stack([(packed << 4) >> 4, packed >> 4], axis=-2)  # of i8 the right shift keeps the sign
    return pairs.reshape(*packed.shape[:-2], -1, packed.shape[-1])


def blockwise_matmul_reference(x_RI: jax.Array, weight: Blockwise, layer: jax.Array) -> jax.Array:
    """`op.blockwise_matmul` on one shard: f32 [R, O]."""
    packed_PO, scale_QO, offset_QO = (jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) for leaf in weight)
    code_IO = unpack(packed_PO)
    (I, O), Q = code_IO.shape, scale_QO.shape[0]
    code_QiO = code_IO.reshape(Q, I // Q, O).astype(x_RI.dtype)
    weight_QiO = code_QiO * scale_QO[:, None] + offset_QO[:, None]
    return jnp.matmul(x_RI, weight_QiO.reshape(I, O), preferred_element_type=jnp.float32)
