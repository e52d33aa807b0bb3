"""Activations times weights in panels."""

import jax
import jax.numpy as jnp

from ..backend import Backend, check_backend, check_shape
from .native_cpu import panel_matmul_native
from .reference import PANEL, Panels, panel_matmul_reference

LONGEST_RUN = 256
"""Inputs that the native kernel unpacks together."""
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def panel_matmul(
    x_RI: jax.Array,
    weight: Panels,
    layer: jax.Array | None = None,
    is_live_R: jax.Array | None = None,
    *,
    outputs: int,
    backend: Backend,
) -> jax.Array:
    """x @ weight, one row or many; sums are f32.

    The native kernel adds them up input after input, of bf16 by AMX's tiles 32 inputs after 32: in the same order
    whatever the number of rows.

    Args:
        x_RI: activations; f32, or bf16 where weights are bf16 or codes.
        weight: see `Panels`.
        layer: i32 scalar, traced or not: which of the weights to take, all of whose arrays are stacked along a leading
            axis. The native kernel reads it where it lies. None: there is one weight, and no such axis.
        is_live_R: bool, which rows count. The others are padding: they may hold anything, NaN too, give zeros, and cost
            the native kernel next to nothing wherever they stand. None: all count.
        outputs: O; the last panel's other outputs are not computed.
        backend: "native_cpu", or any other for XLA's product of the unpacked weight.

    Returns:
        f32 [R, O].

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
    """
    check_backend(backend)
    stack = weight if layer is not None else jax.tree.map(lambda leaf: leaf[None], weight)
    check_stack(stack, x_RI, outputs)
    check_live(is_live_R, x_RI)
    if backend != "native_cpu":
        one = weight if layer is None else _layer_of(weight, layer)
        return panel_matmul_reference(x_RI, one, outputs, is_live_R)
    x_RI = in_pairs(x_RI) if weight.code.dtype == jnp.bfloat16 else x_RI
    return panel_matmul_native(x_RI, stack, jnp.int32(0) if layer is None else layer, live(is_live_R, x_RI), outputs)


def _layer_of(stack: Panels, layer: jax.Array) -> Panels:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)


def in_pairs(x_RI: jax.Array) -> jax.Array:
    """With an even number of inputs, as panels of bfloat16 have it."""
    return jnp.pad(x_RI, ((0, 0), (0, x_RI.shape[1] % 2)))


def live(is_live_R: jax.Array | None, x_RI: jax.Array) -> jax.Array:
    """bool_R, which rows count."""
    return jnp.ones(len(x_RI), bool) if is_live_R is None else is_live_R


def check_live(is_live_R: jax.Array | None, x_RI: jax.Array) -> None:
    """Raises ValueError for what is no bool of each row."""
    if is_live_R is None:
        return
    if is_live_R.dtype != jnp.bool_:
        raise ValueError(f"is_live_R must be bool, got {is_live_R.dtype}")
    check_shape("is_live_R", is_live_R, (len(x_RI),), "R")


def check_stack(stack: Panels, x_RI: jax.Array, outputs: int) -> None:
    """Raises ValueError for weights that are none of this many outputs, or not to be multiplied with `x_RI`."""
    weight = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
    _check_weight(weight, x_RI.shape[1], outputs)
    is_wide = weight.code.dtype in (jnp.float32, jnp.float16)
    allowed = (jnp.float32,) if is_wide else (jnp.float32, jnp.bfloat16)
    if x_RI.dtype not in allowed:
        raise ValueError(f"x_RI must be {' or '.join(jnp.dtype(one).name for one in allowed)}, got {x_RI.dtype}")


def takes_blocks(inputs: int, block: int) -> bool:
    """Whether codes of so many inputs may have a scale for each `block` of them: the native kernel unpacks whole blocks
    together, or within one."""
    is_aligned = LONGEST_RUN % block == 0 or block % LONGEST_RUN == 0 or block == inputs
    return is_aligned and inputs % block == 0 and block % 2 == 0


def _check_weight(weight: Panels, inputs: int, outputs: int) -> None:
    (code, scale, offset, table), P = weight, -(-outputs // PANEL)
    _check_dtypes(weight)
    if code.dtype == jnp.bfloat16:
        return check_shape("code", code, (P, -(-inputs // 2), PANEL, 2), "PIX2")
    if scale is None or scale.ndim == 2:
        check_shape("code", code, (P, inputs, PANEL), "PIX")
        if scale is not None:
            check_shape("scale", scale, (P, PANEL), "PX")
        return
    is_halved = table is not None or (offset is not None and code.shape[1:2] != (inputs,))
    if table is not None:
        check_shape("table", table, (16,), "T")
    check_shape("code", code, (P, inputs // 2 if is_halved else inputs, PANEL), "PIX")
    blocks = scale.shape[1] if scale.ndim == 3 else 0
    for name, leaf in (("scale", scale), ("offset", offset)):
        if leaf is not None:
            check_shape(name, leaf, (P, blocks, PANEL), "PQX")
    if not blocks or inputs % blocks or not takes_blocks(inputs, inputs // blocks):
        raise ValueError(
            f"{inputs=} in {blocks=}: a block must be whole, even, and all inputs, a divisor of {LONGEST_RUN} or a "
            "multiple of it"
        )


def _check_dtypes(weight: Panels) -> None:
    code, scale, offset, table = weight
    dtypes = [str(leaf.dtype) for leaf in weight if leaf is not None]
    if scale is None:
        fits = code.dtype in FLOATS and offset is table is None
    else:
        of_grid = (jnp.float32, jnp.float16) if scale.ndim == 3 else (jnp.float32,)
        is_float8 = code.dtype == jnp.float8_e4m3fn and scale.ndim == 3
        fits = scale.dtype in of_grid and (code.dtype == jnp.int8 or (is_float8 and offset is table is None))
        fits &= offset is None or (scale.ndim == 3 and offset.dtype == scale.dtype)
        fits &= table is None or (scale.ndim == 3 and offset is None and table.dtype == jnp.int8)
    if not fits:
        raise ValueError(
            "panels are float32, bfloat16 or float16, or int8 codes with float32 scales of outputs, or with scales and "
            "offsets of blocks that are both float32 or both float16, or with scales of blocks and an int8 table, or "
            f"float8_e4m3fn with scales of blocks, got {dtypes}"
        )
