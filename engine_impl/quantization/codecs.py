"""How a matrix of floats becomes codes and scales. Pure arithmetic, run once a matrix, on the devices that hold it.

O outputs, I inputs, Q blocks of inputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...kernels import Blockwise

SHRINKS = (0.0, 0.06, 0.12)
"""What is cut off both ends of a block's range, where int4 begins to look for a grid (shares of the range)."""
REFITS = 2
"""How often such a grid is fitted anew to the codes that it gave."""

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
    """`block` inputs share a scale and an offset: weight = code * scale + offset, codes from -8 to 7.

    A block that comes from a file of 4-bit codes lies on a grid of 15 steps or fewer from its least to its largest
    value: where blocks turn out to lie on such grids, each one's number of steps is looked for, so that Q4_0, Q4_1, AWQ
    and GPTQ weights stay what they are. Any other block gets the grid of the least error that `_fitted` finds.

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
    _, steps_QO, found_QO = jax.lax.while_loop(goes_on, look, start)
    whole = _Grid.through(least_QO, -8, scale_of(steps_QO), dtype)
    fitted = jax.lax.cond(
        found_QO.all(), lambda: whole, lambda: _fitted(weight_QiO, whole, least_QO, largest_QO, dtype)
    )
    grid = jax.tree.map(lambda own_QO, other_QO: jnp.where(found_QO, own_QO, other_QO), whole, fitted)
    code_IO = grid.codes(weight_QiO).astype(jnp.int8).reshape(I, O)
    return Blockwise((code_IO[::2] & 15) | (code_IO[1::2] << 4), grid.scale_QO, grid.offset_QO)


class _Grid(NamedTuple):
    """The 16 values that each block has to choose from, code * scale + offset."""

    scale_QO: jax.Array
    offset_QO: jax.Array

    @classmethod
    def through(cls, value_QO: jax.Array, code_QO: jax.Array | int, scale_QO: jax.Array, dtype: jnp.dtype) -> "_Grid":
        """That of a scale, as rounded to `dtype`, which gives a value this code."""
        scale_QO = scale_QO.astype(dtype)
        return cls(scale_QO, (value_QO - code_QO * scale_QO.astype(jnp.float32)).astype(dtype))

    def codes(self, weight_QiO: jax.Array) -> jax.Array:
        """The nearest, still floats."""
        scale_Q1O, offset_Q1O = (leaf[:, None].astype(jnp.float32) for leaf in self)
        return jnp.clip(jnp.round((weight_QiO - offset_Q1O) / scale_Q1O), -8, 7)

    def values(self, code_QiO: jax.Array) -> jax.Array:
        """What codes stand for."""
        return code_QiO * self.scale_QO[:, None].astype(jnp.float32) + self.offset_QO[:, None].astype(jnp.float32)


def _fitted(weight_QiO: jax.Array, whole: _Grid, least_QO: jax.Array, largest_QO: jax.Array, dtype: jnp.dtype) -> _Grid:
    """A grid of small squared error for each block, `whole` at worst, which spans the block.

    It begins with ranges of which a little is cut off at both ends, and fits each grid anew to its codes by weighted
    linear regression. A value's weight is |value| + the block's root mean square: large values matter more, for little
    is known of the activations (so does llama.cpp, make_qkx2_quants in ggml-quants.c).

    SmolLM2-135M, perplexity over that of the weights as they come (2,044 tokens): blocks of 64 1.315 with `whole`,
    1.211 with this, 1.239 with all values weighing the same; blocks of 128, where they divide a matrix, 1.157 and
    1.125.
    """
    rms_Q1O = jnp.sqrt((weight_QiO**2).mean(axis=1, keepdims=True))
    matter_QiO = jnp.abs(weight_QiO) + jnp.maximum(rms_Q1O, jnp.finfo(jnp.float32).tiny)
    matter_QO = matter_QiO.sum(axis=1)

    def error(grid: _Grid) -> jax.Array:
        return (matter_QiO * (grid.values(grid.codes(weight_QiO)) - weight_QiO) ** 2).sum(axis=1)

    def refitted(grid: _Grid) -> _Grid:
        code_QiO = grid.codes(weight_QiO)
        code_QO, value_QO = ((matter_QiO * of_QiO).sum(axis=1) / matter_QO for of_QiO in (code_QiO, weight_QiO))
        apart_QiO = matter_QiO * (code_QiO - code_QO[:, None])
        variance_QO = (apart_QiO * (code_QiO - code_QO[:, None])).sum(axis=1)
        covariance_QO = (apart_QiO * (weight_QiO - value_QO[:, None])).sum(axis=1)
        is_fit_QO = (variance_QO > 0) & (covariance_QO > 0)
        scale_QO = jnp.where(is_fit_QO, covariance_QO / jnp.where(is_fit_QO, variance_QO, 1), grid.scale_QO)
        return _Grid.through(value_QO, code_QO, scale_QO, dtype)

    def better(grid: _Grid, best: _Grid, least_error_QO: jax.Array) -> tuple[_Grid, jax.Array]:
        error_QO = error(grid)
        is_better_QO = error_QO < least_error_QO  # false where a scale has become 0
        best = jax.tree.map(lambda new_QO, old_QO: jnp.where(is_better_QO, new_QO, old_QO), grid, best)
        return best, jnp.where(is_better_QO, error_QO, least_error_QO)

    def refit(_: jax.Array, carry: tuple[_Grid, _Grid, jax.Array]) -> tuple[_Grid, _Grid, jax.Array]:
        grid, best, least_error_QO = carry
        grid = refitted(grid)
        return grid, *better(grid, best, least_error_QO)

    def cut(found: tuple[_Grid, jax.Array], shrink: jax.Array) -> tuple[tuple[_Grid, jax.Array], None]:
        cut_QO = shrink * (largest_QO - least_QO)
        scale_QO = jnp.where(largest_QO > least_QO, (largest_QO - least_QO - 2 * cut_QO) / 15, 1)
        grid = _Grid.through(least_QO + cut_QO, -8, scale_QO, dtype)
        _, best, least_error_QO = jax.lax.fori_loop(0, REFITS, refit, (grid, *better(grid, *found)))
        return (best, least_error_QO), None

    # Loops, since unrolled it takes the compiler longer, for each shape of a matrix.
    (best, _), _ = jax.lax.scan(cut, (whole, error(whole)), jnp.array(SHRINKS, jnp.float32))
    return best
