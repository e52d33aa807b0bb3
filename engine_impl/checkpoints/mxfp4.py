"""MXFP4 (OCP Microscaling Formats, v1.0): blocks of 32 inputs share a power of two; a code is a float of four bits.

As gpt-oss' authors publish it: two codes a byte, the first in the lower half.

CPUs with native kernels hold the codes (`COMPACT`). Elsewhere the values are decoded to bfloat16, which holds all of
them. The blockwise int4 of ours does not: it has 16 equal steps, and these codes have eight unequal ones to either
side; nor does int8 with one scale for all inputs of an output.

O outputs, I inputs, Q blocks of inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ..errors import RefusedError
from .contract import WEIGHT, Codes, Compact
from .prequantized import Arrays, Matrix, Shapes

BLOCKS, SCALES = "blocks", "scales"
BLOCK_BYTES = 16
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Of a code: a sign, two bits of exponent, one of mantissa (E2M1)."""
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=-1)
"""Of a byte."""
COMPACT = Compact("4-bit", 32, table=tuple((2 * VALUES).astype(int).tolist()))
"""Twice the values, which are whole, and half the scales."""
POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""Of a scale, which is an exponent (E8M0)."""


@dataclass(frozen=True, kw_only=True)
class MXFP4:
    """Matrices of such codes: blocks u8 [O, Q, 16] and scales u8 [O, Q]."""

    quantization: None = None
    """They count as floats."""
    kind: str = "MXFP4"
    where: str
    """the config.json that says so"""

    def matrices(self, shapes: Shapes, stored: Callable[[str], np.ndarray]) -> dict[str, Matrix]:
        """As of `Format`. Raises RefusedError for scales that are missing or do not fit."""
        modules = [name.removesuffix(BLOCKS) for name in shapes if name.endswith(f".{BLOCKS}")]
        return {module + WEIGHT: self._matrix(module, shapes) for module in modules}

    def _matrix(self, module: str, shapes: Shapes) -> Matrix:
        at = shapes[module + BLOCKS]
        if len(at) != 3 or at[2] != BLOCK_BYTES:
            raise self._refused(f"wants {module}{BLOCKS} to be [outputs, blocks, {BLOCK_BYTES}], but it is {at}")
        if shapes.get(module + SCALES) != at[:2]:
            there = f"is {shapes[module + SCALES]}" if module + SCALES in shapes else "is missing"
            raise self._refused(f"wants {module}{SCALES} to be {at[:2]}, but it {there}")
        return Matrix((at[0], at[1] * 2 * BLOCK_BYTES), {part: module + part for part in (BLOCKS, SCALES)})

    def compact(self, matrix: Matrix) -> Compact:
        """The form of `codes`."""
        return COMPACT

    def codes(self, matrix: Matrix, arrays: Arrays) -> Codes:
        """As `COMPACT` describes them. Raises RefusedError for codes of another type."""
        self._check(matrix, arrays)
        byte_OQj = arrays[BLOCKS]
        code_OQi = np.stack([byte_OQj & 15, byte_OQj >> 4], axis=-1).view(np.int8)
        return Codes(code_OQi.reshape(matrix.shape), POWERS[arrays[SCALES]] / 2, None)

    def floats(self, matrix: Matrix, arrays: Arrays) -> np.ndarray:
        """Bfloat16 [O, I]. Raises RefusedError for codes of another type."""
        self._check(matrix, arrays)
        scale_OQ = POWERS[arrays[SCALES]]
        weight_OQi = PAIRS[arrays[BLOCKS]].reshape(*scale_OQ.shape, -1)
        weight_OQi *= scale_OQ[..., None]
        upper_OQi = (weight_OQi.view(np.uint32) >> 16).astype(np.uint16)  # the lower half is zero: two bits are set
        return upper_OQi.view(jnp.dtype("bfloat16")).reshape(matrix.shape)

    def _check(self, matrix: Matrix, arrays: Arrays) -> None:
        for part, array in arrays.items():
            if array.dtype != np.uint8:
                raise self._refused(f"wants {matrix.parts[part]} to be uint8, but it is {array.dtype.name}")

    def _refused(self, what: str) -> RefusedError:
        return RefusedError(f"{self.where!r} {what}; fetch the model anew")
