"""What a GGUF file holds (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The `gguf` package's own reader makes an array of every token and merge: three seconds for a vocabulary of 50,000, at
every start. Here it is a tenth of one. Dequantising is left to the package.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .by_rows import by_rows
from .contract import Codes
from .gguf_codes import codes_of

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    """bytes from the file's start"""
    bytes_shape: tuple[int, ...]
    """u8, the shape in which it is stored"""


class GGUFFile:
    """An open file: `fields` by their keys, `tensors` by their names."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that is cut or no GGUF file."""
        self.path = path
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                self._read(_Reader(data))
            except (struct.error, OverflowError, MemoryError) as error:
                raise ValueError(f"it ends too early: {error}") from error

    def tensor(self, name: str, index: int | None = None) -> np.ndarray:
        """One tensor, or one entry along its first axis, dequantised, f32.

        Raises ValueError for a kind that the `gguf` package cannot dequantise.
        """
        kind = self.tensors[name].kind
        try:
            return _dequantised(self._stored(name, index), kind)
        except NotImplementedError as error:
            raise ValueError(f"tensor {name} is stored as {kind.name}, which cannot be dequantised") from error

    def codes(self, name: str, index: int | None = None) -> Codes:
        """A matrix, or one of a stack, of a kind whose `compact_of` are codes."""
        return codes_of(self._stored(name, index), self.tensors[name].kind)

    def _stored(self, name: str, index: int | None) -> np.ndarray:
        at = self.tensors[name]
        stored = np.memmap(self.path, np.uint8, "r", at.offset, at.bytes_shape)
        return stored if index is None else stored[index]

    def _read(self, reader: "_Reader") -> None:
        if reader.bytes(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := reader.number("I")) not in _VERSIONS:
            raise ValueError(f"its version is {version}, those there are: 2, 3")
        tensor_count, field_count = reader.number("Q"), reader.number("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = reader.string()
            self.fields[key] = reader.value(reader.number("I"))
        infos = [reader.tensor_info() for _ in range(tensor_count)]
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        start = -(-reader.position // alignment) * alignment
        self.tensors = {name: _stored(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
        end = max((at.offset + math.prod(at.bytes_shape) for at in self.tensors.values()), default=0)
        if len(self.tensors) < tensor_count:
            raise ValueError("two of its tensors have one name")
        if end > reader.size:
            raise ValueError(f"it has {reader.size} bytes of {end}")


def _dequantised(stored: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Float32. Blocks lie within the last axis, so that rows are independent."""
    rows = stored.reshape(-1, stored.shape[-1])
    columns = gguf.quants.quant_shape_from_byte_shape(rows.shape, kind)[-1]
    out = np.empty((len(rows), columns), np.float32)

    def dequantise(some: slice) -> None:
        out[some] = gguf.quants.dequantize(rows[some], kind)

    by_rows(len(rows), out.nbytes, dequantise)
    return out.reshape(*stored.shape[:-1], columns)


def _stored(name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    if kind not in set(gguf.GGMLQuantizationType):
        raise ValueError(
            f"tensor {name} is of kind {kind}, which gguf {version('gguf')} does not know; pip install -U gguf"
        )
    known = gguf.GGMLQuantizationType(kind)
    return StoredTensor(shape, known, offset, gguf.quants.quant_shape_to_byte_shape(shape, known))


class _Reader:
    """Walks through the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.position, self.size = data, 0, len(data)

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > self.size:
            raise ValueError(f"it ends too early: {self.size} bytes")
        taken, self.position = self._data[self.position : end], end
        return taken

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self._data, self.position)
        self.position += struct.calcsize(f"<{form}")
        return value

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind != _ARRAY:
            return self._reading(kind)()
        of_items, count = self.number("I"), self.number("Q")
        if of_items in _NUMBERS:
            form = f"<{_NUMBERS[of_items]}"
            return [value for (value,) in struct.iter_unpack(form, self.bytes(count * struct.calcsize(form)))]
        read = self._reading(of_items)
        return [read() for _ in range(count)]

    def _reading(self, kind: int) -> Callable[[], Any]:
        if kind == _STRING:
            return self.string
        if kind == _ARRAY:
            return lambda: self.value(_ARRAY)
        if kind not in _NUMBERS:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        return lambda: self.number(_NUMBERS[kind])

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, kind, offset from where the data begin)"""
        name, dimensions = self.string(), self.number("I")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]  # stored fastest first
        return name, shape, self.number("I"), self.number("Q")
