"""Checkpoints of which some modules were quantised otherwise than the rest: each is decoded by its own format.

They count as floats, exactly: the engine has one kind of codes for all.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .contract import Codes, Compact
from .prequantized import Arrays, Format, Matrix, Shapes
from .widened import Float8


@dataclass(frozen=True)
class Own(Matrix):
    """A quantised weight, and how it lies."""

    format: Format | Float8


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Several formats in one folder."""

    quantization: None = None
    """They count as floats."""
    kind: str = "several kinds"
    where: str
    """the config.json that says so"""
    formats: Mapping[str, Format | Float8 | None]
    """Regular expression of modules' names -> how they lie; None: they were left as they are. The first that matches
    counts."""

    def matrices(self, shapes: Shapes, stored: Callable[[str], np.ndarray]) -> dict[str, Matrix]:
        """As of `Format`."""
        shapes_of: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            shapes_of.setdefault(self._pattern_of(name.rpartition(".")[0]) or "", {})[name] = shape
        return {
            name: Own(matrix.shape, matrix.parts, own)
            for pattern, own in self.formats.items()
            if own is not None
            for name, matrix in own.matrices(shapes_of.get(pattern, {}), stored).items()
        }

    def floats(self, matrix: Matrix, arrays: Arrays) -> np.ndarray:
        """Float32 [O, I]."""
        assert isinstance(matrix, Own)
        return matrix.format.floats(matrix, arrays)

    def compact(self, matrix: Matrix) -> Compact | None:
        """The form of `codes`; None: there is none but `floats`."""
        assert isinstance(matrix, Own)
        return matrix.format.compact(matrix) if isinstance(matrix.format, Float8) else None

    def codes(self, matrix: Matrix, arrays: Arrays) -> Codes:
        """Of a matrix that has a compact form."""
        assert isinstance(matrix, Own)
        assert isinstance(matrix.format, Float8)
        return matrix.format.codes(matrix, arrays)

    def _pattern_of(self, module: str) -> str | None:
        names = (module, f"model.{module}")
        return next((pattern for pattern in self.formats if any(re.fullmatch(pattern, name) for name in names)), None)
