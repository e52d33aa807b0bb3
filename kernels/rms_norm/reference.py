"""Root mean square norms in plain XLA: the definition."""

import jax
import jax.numpy as jnp


def rms_norm_reference(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """`op.rms_norm`."""
    return jnp.broadcast_to(weight_D, x.shape) * (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps))
