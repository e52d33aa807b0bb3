"""How a matrix of floats becomes codes and scales. Pure arithmetic, run once a matrix, on the devices that hold it.

O outputs, I inputs, Q blocks of inputs.
"""

import functools

import jax
import jax.numpy as jnp

from ..kernels import Blockwise

EXACT = 1e-5
"""What a value may be off its grid, over its block's largest, to count as on it: float32 rounding of scale * code."""

FEWEST = 64
"""Steps from zero to an int8 row's largest: fewer have a multiple between this and 127."""


@jax.jit
def encode_int8(weight_OI: jax.Array) -> dict[str, jax.Array]:
    """One scale an output, symmetric: weight = code * scale, |error| <= scale / 2.

    The scale is the row's largest magnitude over 127. A row that some other tool has quantised, and that comes here as
    floats, keeps its codes: where rows turn out to be whole multiples of a scale, over 127 or over 128, the others' own
    scale is looked for (a tool that corrects errors as it goes, as GPTQ does, need not reach 127 in every row).

    Returns:
        code i8 [O, I], scale f32 [O].
    """
    weight_OI = weight_OI.astype(jnp.float32)
    largest_O1 = jnp.abs(weight_OI).max(axis=1, keepdims=True)
    is_zero_O1 = largest_O1 == 0

    def encoded(steps_O1: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        scale_O1 = jnp.where(is_zero_O1, 1, largest_O1 / steps_O1)
        return jnp.clip(jnp.round(weight_OI / scale_O1), -128, 127), scale_O1

    def look(steps: jax.Array | int, steps_O1: jax.Array, found_O1: jax.Array) -> tuple[jax.Array, jax.Array]:
        code_OI, scale_O1 = encoded(steps)
        off_O1 = jnp.abs(code_OI * scale_O1 - weight_OI).max(axis=1, keepdims=True)
        here_O1 = ~found_O1 & (off_O1 <= EXACT * largest_O1)
        return jnp.where(here_O1, steps, steps_O1), found_O1 | here_O1

    def goes_on(carry):
        steps, _, found_O1 = carry
        return (steps >= FEWEST) & (found_O1 & ~is_zero_O1).any() & ~found_O1.all()

    found = look(127, jnp.full_like(largest_O1, 127), is_zero_O1)
    found = look(128, *found)
    start = (jnp.float32(126), *found)
    _, steps_O1, _ = jax.lax.while_loop(goes_on, lambda carry: (carry[0] - 1, *look(*carry)), start)
    code_OI, scale_O1 = encoded(steps_O1)
    return {"code": code_OI.astype(jnp.int8), "scale": scale_O1[:, 0]}


@jax.jit
def encode_int8_experts(weight_EIO: jax.Array) -> dict[str, jax.Array]:
    """Likewise for each expert: code i8 [E, I, O], scale f32 [E, O]."""
    encoded = jax.vmap(encode_int8)(weight_EIO.swapaxes(1, 2))
    return {"code": encoded["code"].swapaxes(1, 2), "scale": encoded["scale"]}


@functools.partial(jax.jit, static_argnames=("block", "dtype"))
def encode_int4(weight_OI: jax.Array, block: int, dtype: jnp.dtype) -> Blockwise:
    """`block` inputs share a scale and an offset: weight = code * scale + offset, |error| <= scale / 2.

    A block's least value gets the code -8 and its largest 7, 15 steps above. A block that comes from a file of 4-bit
    codes may use fewer steps: where other blocks turn out to lie on such a grid, its own number of steps is looked for,
    so that Q4_0, Q4_1, AWQ and GPTQ weights stay what they are.

    Args:
        block: divides I.
        dtype: of scale and offset; codes are chosen for what they are in that type.
    """
    (O, I), Q = weight_OI.shape, weight_OI.shape[1] // block
    weight_QiO = weight_OI.astype(jnp.float32).T.reshape(Q, block, O)
    least_QO, largest_QO = weight_QiO.min(axis=1), weight_QiO.max(axis=1)
    allowed_QO = EXACT * jnp.maximum(jnp.abs(least_QO), jnp.abs(largest_QO))

    def scale_of(steps_QO: jax.Array) -> jax.Array:
        return jnp.where(largest_QO > least_QO, (largest_QO - least_QO) / steps_QO, 1)

    def is_on_grid(steps: jax.Array) -> jax.Array:
        scale_QO = scale_of(jnp.full_like(least_QO, steps))
        step_QiO = (weight_QiO - least_QO[:, None]) / scale_QO[:, None]
        off_QiO = jnp.abs(step_QiO - jnp.round(step_QiO)) * scale_QO[:, None]
        return off_QiO.max(axis=1) <= allowed_QO

    def look(carry):
        steps, steps_QO, found_QO = carry
        steps = steps - 1
        here_QO = ~found_QO & is_on_grid(steps)
        return steps, jnp.where(here_QO, steps, steps_QO), found_QO | here_QO

    def goes_on(carry):
        steps, _, found_QO = carry
        return (steps > 1) & found_QO.any() & ~found_QO.all()

    start = (jnp.float32(15), jnp.full_like(least_QO, 15), is_on_grid(jnp.float32(15)))
    _, steps_QO, _ = jax.lax.while_loop(goes_on, look, start)
    scale_QO = scale_of(steps_QO).astype(dtype)
    offset_QO = (least_QO + 8 * scale_QO.astype(jnp.float32)).astype(dtype)
    code_QiO = (weight_QiO - offset_QO[:, None].astype(jnp.float32)) / scale_QO[:, None].astype(jnp.float32)
    code_IO = jnp.clip(jnp.round(code_QiO), -8, 7).astype(jnp.int8).reshape(I, O)
    return Blockwise((code_IO[::2] & 15) | (code_IO[1::2] << 4), scale_QO, offset_QO)
