"""Root mean square norms (Zhang & Sennrich, arXiv 1910.07467)."""

import jax
import jax.numpy as jnp

from ..backend import Backend, check_backend, check_shape
from .native_cpu import rms_norm_native
from .reference import rms_norm_reference


def rms_norm(x: jax.Array, weight_D: jax.Array, *, eps: float, backend: Backend) -> jax.Array:
    """weight times x over its root mean square along the last axis.

    Args:
        x: f32 [..., D].
        weight_D: f32.
        eps: added to the mean square.
        backend: "native_cpu", or any other for XLA's operations.

    Returns:
        f32, x's shape.

    Raises:
        ValueError: another type, or weights of another size, at trace time.
    """
    check_backend(backend)
    if not x.dtype == weight_D.dtype == jnp.float32:
        raise ValueError(f"x and weight_D must be float32, got {x.dtype} and {weight_D.dtype}; cast before the call")
    check_shape("weight_D", weight_D, x.shape[-1:], "D")
    if backend != "native_cpu":
        return rms_norm_reference(x, weight_D, eps)
    return rms_norm_native(x, weight_D, eps)
