"""Activations times weights in panels."""

import jax
import jax.numpy as jnp

from ..backend import Backend, check_backend, check_shape
from .native_cpu import panel_matmul_native
from .reference import PANEL, Panels, panel_matmul_reference

LONGEST_RUN = 256
"""Inputs that the native kernel unpacks together: a block of 4-bit codes divides it."""


def panel_matmul(x_RI: jax.Array, weight: Panels, *, outputs: int, backend: Backend) -> jax.Array:
    """x @ weight, one row or many; sums are f32, in the native kernel input after input whatever the number of rows.

    Args:
        x_RI: activations; f32 where weights are, bf16 where weights are, and either for codes.
        weight: see `Panels`.
        outputs: O; the last panel's other outputs are not computed.
        backend: "native_cpu", or any other for XLA's product of the unpacked weight.

    Returns:
        f32 [R, O].

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
    """
    check_backend(backend)
    _check(weight, x_RI.shape[1], outputs)
    allowed = (jnp.float32, jnp.bfloat16) if weight.scale is not None else (weight.code.dtype,)
    if x_RI.dtype not in allowed:
        raise ValueError(f"x_RI must be {' or '.join(jnp.dtype(one).name for one in allowed)}, got {x_RI.dtype}")
    if weight.code.dtype == jnp.bfloat16:
        x_RI = jnp.pad(x_RI, ((0, 0), (0, x_RI.shape[1] % 2)))
    matmul = panel_matmul_native if backend == "native_cpu" else panel_matmul_reference
    return matmul(x_RI, weight, outputs)


def _check(weight: Panels, inputs: int, outputs: int) -> None:
    (code, scale, offset), P = weight, -(-outputs // PANEL)
    of_code = (jnp.float32, jnp.bfloat16) if scale is None else (jnp.int8,)
    if code.dtype not in of_code or any(leaf is not None and leaf.dtype != jnp.float32 for leaf in (scale, offset)):
        dtypes = [str(leaf.dtype) for leaf in weight if leaf is not None]
        raise ValueError(f"panels are float32 or bfloat16, or int8 codes with float32 scales, got {dtypes}")
    if code.dtype == jnp.bfloat16:
        return check_shape("code", code, (P, -(-inputs // 2), PANEL, 2), "PIX2")
    if scale is None or offset is None:
        check_shape("code", code, (P, inputs, PANEL), "PIX")
        if scale is not None:
            check_shape("scale", scale, (P, PANEL), "PX")
        return
    check_shape("code", code, (P, inputs // 2, PANEL), "PIX")
    blocks = scale.shape[1] if scale.ndim == 3 else 0
    for name, leaf in (("scale", scale), ("offset", offset)):
        check_shape(name, leaf, (P, blocks, PANEL), "PQX")
    if not blocks or inputs % blocks or LONGEST_RUN % (inputs // blocks) or inputs // blocks % 2:
        raise ValueError(f"{inputs=} in {blocks=}: a block must be whole and a divisor of {LONGEST_RUN}, at least 2")
