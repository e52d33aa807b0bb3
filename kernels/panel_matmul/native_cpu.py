"""The products in C++: kernels/native/panel_matmul.h."""

import jax
import jax.numpy as jnp

from .. import native
from .reference import Panels


def panel_matmul_native(
    x_RI: jax.Array, weight: Panels, layer: jax.Array, is_live_R: jax.Array, outputs: int
) -> jax.Array:
    """`op.panel_matmul` of a stack: f32 [R, O]. The layer is read where it lies."""
    out_RO = jax.ShapeDtypeStruct((x_RI.shape[0], outputs), jnp.float32)
    return native.call("slipstream_panel_matmul", out_RO, x_RI, is_live_R, weight.code, *grid_of(weight), layer)


def grid_of(weight: Panels) -> list[jax.Array]:
    """All but the codes as operands, empty where there is none."""
    return [jnp.zeros((0,), jnp.float32) if leaf is None else leaf for leaf in weight[1:]]
