"""The definition, in plain XLA. It unpacks every expert."""

import jax
import jax.numpy as jnp

from ..panel_matmul import Panels, rounded, unpack


def expert_matmul_reference(
    x_RI: jax.Array, expert_RX: jax.Array, weight: Panels, outputs: int, is_live_R: jax.Array | None = None
) -> jax.Array:
    """`op.expert_matmul`: f32 [R, X, O]."""
    if x_RI.dtype == jnp.bfloat16:
        x_RI = rounded(x_RI.astype(jnp.float32))
    weight_EOI = jax.vmap(lambda one: unpack(one, outputs, x_RI.shape[1]))(weight)
    out_RXO = jnp.einsum("RI,RXOI->RXO", x_RI, weight_EOI[expert_RX])
    return out_RXO if is_live_R is None else jnp.where(is_live_R[:, None, None], out_RXO, 0)
