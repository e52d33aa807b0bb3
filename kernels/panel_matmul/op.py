"""Activations times weights in panels."""

import jax
import jax.numpy as jnp

from ..backend import Backend, check_backend
from .native_cpu import panel_matmul_native
from .reference import PANEL, Panels, panel_matmul_reference


def panel_matmul(x_RI: jax.Array, weight: Panels, *, outputs: int, backend: Backend) -> jax.Array:
    """x @ weight, one row or many; weights become floats in registers, sums are f32.

    Args:
        x_RI: activations, f32.
        weight: see `Panels`.
        outputs: O; the last panel's other outputs are not computed.
        backend: "native_cpu", or any other for XLA's product of the unpacked weight.

    Returns:
        f32 [R, O].

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
    """
    check_backend(backend)
    I, code = x_RI.shape[1], weight.code
    if x_RI.dtype != jnp.float32:
        raise ValueError(f"x_RI must be float32, got {x_RI.dtype}")
    if code.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"panels have float32 or bfloat16, got {code.dtype}")
    if code.shape != (-(-outputs // PANEL), I, PANEL):
        raise ValueError(f"panels of {outputs=} must be [{-(-outputs // PANEL)}, {I}, {PANEL}], got {code.shape}")
    matmul = panel_matmul_native if backend == "native_cpu" else panel_matmul_reference
    return matmul(x_RI, weight, outputs)
