"""Checkpoints whose codes are floats of 8 bits, or stand for the values of a table (NF4): they are widened to floats,
but for floats of 8 bits by CPUs with native kernels.

A weight is a code's value times its scale, in float32. Formats as transformers, llm-compressor, AutoFP8 and
bitsandbytes write them. Scales of activations are left out: ours stay floats, which is more exact.

O outputs, I inputs.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import RefusedError
from .contract import FLOAT8, WEIGHT, Codes, Compact
from .prequantized import Arrays, Matrix, Shapes

VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)
"""Of every code. Looking them up takes a quarter of the time that a cast does."""

SCALES = ("weight_scale_inv", "weight_scale")
"""What tools call the factor of codes, in spite of the first one's name."""
INPUT_SCALE = "input_scale"

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, kw_only=True)
class Float8:
    """Matrices of float8_e4m3fn, with one scale, one for each output, or one for each block."""

    quantization: None = None
    """They count as floats."""
    kind: str = "fp8"
    where: str
    """the config.json that says so"""
    strategy: Literal["tensor", "channel", "block"]
    block: tuple[int, int] = (1, 1)
    """outputs and inputs that share a scale, if the strategy says so"""
    fixed_activations: bool = False
    """Whether modules have a scale for activations too."""

    def matrices(self, shapes: Shapes, stored: Callable[[str], np.ndarray]) -> dict[str, Matrix]:
        """As of `Format`. Raises RefusedError for scales that do not fit."""
        found: dict[str, Matrix] = {}
        for scale in SCALES:
            for name in [name for name in shapes if name.endswith(f".{scale}")]:
                module = name.removesuffix(scale)
                found[module + WEIGHT] = self._matrix(module, scale, shapes)
        return found

    def _matrix(self, module: str, scale: str, shapes: Shapes) -> Matrix:
        at = shapes.get(module + WEIGHT, ())
        if len(at) != 2:
            raise self._refused(f"needs a matrix {module}{WEIGHT} beside {module}{scale}")
        O, I = at
        allowed = {
            "tensor": [(), (1,), (1, 1)],
            "channel": [(O, 1), (O,)],
            "block": [(-(-O // self.block[0]), -(-I // self.block[1]))],
        }[self.strategy]
        if shapes[module + scale] not in allowed:
            raise self._refused(f"wants {module}{scale} to be {allowed[0]}, but it is {shapes[module + scale]}")
        parts = {WEIGHT: module + WEIGHT, "scale": module + scale}
        if self.fixed_activations and module + INPUT_SCALE in shapes:
            parts[INPUT_SCALE] = module + INPUT_SCALE
        return Matrix((O, I), parts)

    def compact(self, matrix: Matrix) -> Compact:
        """The form of `codes`."""
        return Compact("float8", self.block[1] if self.strategy == "block" else matrix.shape[1])

    def codes(self, matrix: Matrix, arrays: Arrays) -> Codes:
        """Each output has scales of its own. Raises RefusedError for codes of another type."""
        self._check(matrix, arrays)
        (O, _), scale = matrix.shape, arrays["scale"].astype(np.float32)
        if self.strategy == "block":
            return Codes(arrays[WEIGHT], scale.repeat(self.block[0], axis=0)[:O], None)
        return Codes(arrays[WEIGHT], np.broadcast_to(scale.reshape(-1, 1), (O, 1)), None)

    def floats(self, matrix: Matrix, arrays: Arrays) -> np.ndarray:
        """Float32 [O, I]. Raises RefusedError for codes of another type."""
        self._check(matrix, arrays)
        scale = arrays["scale"].astype(np.float32)
        weight_OI = VALUES[arrays[WEIGHT].view(np.uint8)]
        if self.strategy != "block":
            weight_OI *= scale.reshape(-1, 1)
            return weight_OI
        outputs, inputs = self.block
        for i, scale_Q in enumerate(scale):
            weight_OI[i * outputs : (i + 1) * outputs] *= scale_Q.repeat(inputs)[: matrix.shape[1]]
        return weight_OI

    def _check(self, matrix: Matrix, arrays: Arrays) -> None:
        dtype = arrays[WEIGHT].dtype
        if dtype != FLOAT8:
            raise self._refused(f"wants {matrix.parts[WEIGHT]} to be {FLOAT8.name}, but it is {dtype.name}")

    def _refused(self, what: str) -> RefusedError:
        return RefusedError(f"{self.where!r} {what}; fetch the model anew")


@dataclass(frozen=True, kw_only=True)
class NF4:
    """bitsandbytes' 4-bit NormalFloat (Dettmers et al., arXiv 2305.14314): codes of a table of 16 values, two a byte,
    the first in the upper half; a scale for each block of values in a row. The scales may be codes themselves, of
    a table of 256."""

    quantization: None = None
    """They count as floats."""
    kind: str = "NF4"
    where: str
    """the config.json that says so"""

    def matrices(self, shapes: Shapes, stored: Callable[[str], np.ndarray]) -> dict[str, Matrix]:
        """As of `Format`. Raises RefusedError when a module's tensors are not all there."""
        modules = [name.removesuffix(NF4_STATE) for name in shapes if name.endswith(f".{NF4_STATE}")]
        return {module + WEIGHT: self._matrix(module, shapes, stored) for module in modules}

    def _matrix(self, module: str, shapes: Shapes, stored: Callable[[str], np.ndarray]) -> Matrix:
        state = _state(stored(module + NF4_STATE))
        O, I = state["shape"]
        blocks = -(-O * I // state["blocksize"])
        needed = {WEIGHT: (-(-O * I // 2), 1), f"{WEIGHT}.absmax": (blocks,), f"{WEIGHT}.quant_map": (16,)}
        if "nested_blocksize" in state:
            nested = -(-blocks // state["nested_blocksize"])
            needed |= {f"{WEIGHT}.nested_absmax": (nested,), f"{WEIGHT}.nested_quant_map": (256,)}
        for part, shape in needed.items():
            if shapes.get(module + part) != shape:
                there = f"is {shapes[module + part]}" if module + part in shapes else "is missing"
                raise RefusedError(
                    f"{self.where!r} wants {module}{part} to be {shape}, but it {there}; fetch the model anew"
                )
        return Matrix((O, I), {part: module + part for part in (*needed, NF4_STATE)})

    def floats(self, matrix: Matrix, arrays: Arrays) -> np.ndarray:
        """Float32 [O, I]."""
        state = _state(arrays[NF4_STATE])
        scale = arrays[f"{WEIGHT}.absmax"]
        if "nested_blocksize" in state:
            of_scales = arrays[f"{WEIGHT}.nested_absmax"].repeat(state["nested_blocksize"])[: len(scale)]
            scale = arrays[f"{WEIGHT}.nested_quant_map"][scale] * of_scales + np.float32(state["nested_offset"])
        byte, count = arrays[WEIGHT][:, 0], math.prod(matrix.shape)
        code = np.stack([byte >> 4, byte & 15], axis=-1).reshape(-1)[:count]
        weight = arrays[f"{WEIGHT}.quant_map"].astype(np.float32)[code]
        weight *= scale.astype(np.float32).repeat(state["blocksize"])[:count]
        return weight.reshape(matrix.shape)


def _state(stored: np.ndarray) -> dict[str, Any]:
    """What bitsandbytes notes of a matrix: JSON, as bytes."""
    return json.loads(bytes(stored))
