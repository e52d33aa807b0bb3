"""Products with int8 weights, out = x @ (code * scale).T: three ways to treat x.

R rows, O outputs, I inputs. x is bf16 or f32, as out; code_OI is i8, scale_O f32. Where several matrices are multiplied
with one x these are [G, O, I] and [G, O], and out is [G, R, O]. Each works on one device's share: `shared` runs it on a
mesh, so that rows are rounded by the share of them that a device has, and no device waits to learn the largest of all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...kernels import AXIS, Split

Multiply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x_RI, code_OI, scale_O) -> out_RO"""

PARTS = 254
"""A remainder of rounding, at most half a step, is counted in steps this much smaller, to fit an int8."""


def shared(multiply: Multiply, split: Split, mesh: Mesh, *, groups: bool = False) -> Multiply:
    """`multiply` on every device's share. With shared outputs x is whole on each device and the result is shared,
    with shared inputs x is, and the results are added up. `groups`: of several matrices."""

    def of_device(x_RI: jax.Array, code_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
        out_RO = multiply(x_RI, code_OI, scale_O)
        return jax.lax.psum(out_RO, AXIS) if split == "inputs" else out_RO

    outputs, inputs = (AXIS if split == axis else None for axis in ("outputs", "inputs"))
    front = (None,) if groups else ()
    in_specs = (P(None, inputs), P(*front, outputs, inputs), P(*front, outputs))
    return jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=P(*front, None, outputs))


def multiply_floats(x_RI: jax.Array, code_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
    """x as it is. XLA:TPU turns the codes into floats on their way to the multiplier, not in memory."""
    out_RO = _product(x_RI, code_OI.astype(x_RI.dtype), jnp.float32)
    return (out_RO * _of_rows(scale_O)).astype(x_RI.dtype)


def multiply_rounded(x_RI: jax.Array, code_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
    """x rounded to int8, symmetric, a scale for each row; int8 x int8 -> int32 has twice a v5e's bf16 rate."""
    code_RI, scale_R1 = _rounded(x_RI)
    out_RO = _integer_product(jnp.round(code_RI), code_OI)
    return (out_RO * scale_R1 * _of_rows(scale_O)).astype(x_RI.dtype)


def multiply_split(x_RI: jax.Array, code_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
    """x as the sum of two int8, coarse and fine, with 16 bits between them: an error of 2**-16 of a row's largest.

    For CPUs, where XLA turns int8 into floats one by one, but has fast int8 products: all matrices of 576 x 1536 of 30
    layers on 2 (busy) cores, in ms with 1 / 8 / 32 / 128 rows: f32 weights 15 / 35 / 51 / 130, codes turned into f32
    190 with 8, split 16 / 18 / 41 / 210.
    """
    code_RI, scale_R1 = _rounded(x_RI)
    coarse_RI = jnp.round(code_RI)
    fine_RI = jnp.round((code_RI - coarse_RI) * PARTS)
    R = x_RI.shape[0]
    out_RO = _integer_product(jnp.concatenate([coarse_RI, fine_RI]), code_OI)
    coarse_RO, fine_RO = out_RO[..., :R, :], out_RO[..., R:, :]
    return ((coarse_RO + fine_RO / PARTS) * scale_R1 * _of_rows(scale_O)).astype(x_RI.dtype)


def _rounded(x_RI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x in steps of a 127th of its row's largest, not rounded yet, and the step."""
    wide_RI = x_RI.astype(jnp.float32)
    largest_R1 = jnp.abs(wide_RI).max(axis=1, keepdims=True)
    scale_R1 = jnp.where(largest_R1 > 0, largest_R1 / 127, 1)
    return wide_RI / scale_R1, scale_R1


def _of_rows(scale_O: jax.Array) -> jax.Array:
    """With an axis of rows, of one."""
    return jnp.expand_dims(scale_O, -2)


def _integer_product(code_RI: jax.Array, code_OI: jax.Array) -> jax.Array:
    return _product(code_RI.astype(jnp.int8), code_OI, jnp.int32).astype(jnp.float32)


def _product(x_RI: jax.Array, code_OI: jax.Array, sums: Any) -> jax.Array:
    """Rows come first, of several matrices too: so XLA:TPU leaves each row's answers side by side, which takes it 54.4
    thousand static cycles instead of 57.6 for gate and up of llama-3.1-8b and 128 rows on v5e:2x4."""
    inputs = ((x_RI.ndim - 1,), (code_OI.ndim - 1,))
    out_RO = jax.lax.dot_general(x_RI, code_OI, (inputs, ((), ())), preferred_element_type=sums)
    return jnp.moveaxis(out_RO, 0, -2)
