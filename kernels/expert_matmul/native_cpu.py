"""The products in C++: kernels/native/experts.cc."""

import jax
import jax.numpy as jnp

from .. import native
from ..panel_matmul import Panels
from ..panel_matmul.native_cpu import grid_of


def expert_matmul_native(
    x_RI: jax.Array, is_live_R: jax.Array, expert_RX: jax.Array, weight: Panels, outputs: int
) -> jax.Array:
    """`op.expert_matmul`: f32 [R, X, O]."""
    out_RXO = jax.ShapeDtypeStruct((*expert_RX.shape, outputs), jnp.float32)
    operands = (x_RI, is_live_R, expert_RX, weight.code, *grid_of(weight))
    return native.call("slipstream_expert_matmul", out_RXO, *operands)
