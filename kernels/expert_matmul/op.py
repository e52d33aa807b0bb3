"""Activations times weights in panels, of which there is a stack: an expert's each."""

import jax
import jax.numpy as jnp

from ..backend import Backend, check_backend, check_shape
from ..panel_matmul import Panels
from ..panel_matmul.op import check_live, check_stack, in_pairs, live
from .native_cpu import expert_matmul_native
from .reference import expert_matmul_reference


def expert_matmul(
    x_RI: jax.Array,
    expert_RX: jax.Array,
    weight: Panels,
    is_live_R: jax.Array | None = None,
    *,
    outputs: int,
    backend: Backend,
) -> jax.Array:
    """Each row times the weights of X of the E experts. Only weights that a row chose are read, once for all its rows.

    A product is `panel_matmul`'s of that expert, bit for bit.

    Args:
        x_RI: activations; f32, or bf16 where weights are bf16 or codes.
        expert_RX: i32, from 0 to E - 1; a row may name one several times.
        weight: `Panels` whose arrays have an axis E in front.
        is_live_R: as of `panel_matmul`; a row that does not count may name any number.
        outputs: O.
        backend: "native_cpu", or any other for XLA's products of unpacked weights.

    Returns:
        f32 [R, X, O].

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
        jax.errors.JaxRuntimeError: an expert that there is not; from the native kernel.
    """
    check_backend(backend)
    if expert_RX.dtype != jnp.int32:
        raise ValueError(f"expert_RX must be int32, got {expert_RX.dtype}")
    check_shape("expert_RX", expert_RX, (len(x_RI), expert_RX.shape[-1]), "RX")
    check_stack(weight, x_RI, outputs)
    check_live(is_live_R, x_RI)
    if backend != "native_cpu":
        return expert_matmul_reference(x_RI, expert_RX, weight, outputs, is_live_R)
    x_RI = in_pairs(x_RI) if weight.code.dtype == jnp.bfloat16 else x_RI
    return expert_matmul_native(x_RI, live(is_live_R, x_RI), expert_RX, weight, outputs)
