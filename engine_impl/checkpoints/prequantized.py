"""Checkpoints whose matrices some other tool has quantised: AWQ, GPTQ and compressed-tensors.

They are decoded to floats, matrix by matrix: weight = (code - zero) * scale, which float32 holds exactly, so that
weight_codecs.py finds the same codes again. The formats are those that AutoAWQ, AutoGPTQ, GPTQModel and
llm-compressor write.

O outputs, I inputs, Q groups of inputs; a word is an int32 of eight 4-bit codes, or of four 8-bit ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import RefusedError
from .contract import WEIGHT, Quantization

PER_WORD = 8
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight columns lies in an AWQ word."""

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]


class Codes(NamedTuple):
    """weight = (code - zero) * scale, zero and scale being those of the input's group."""

    code_OI: np.ndarray
    zero_OQ: np.ndarray
    scale_OQ: np.ndarray


def read_awq(parts: Arrays) -> Codes:
    """qweight i32 [I, O/8], qzeros i32 [Q, O/8], scales [Q, O]."""

    def codes(word_RW: np.ndarray) -> np.ndarray:
        code_RWp = nibbles(word_RW).reshape(*word_RW.shape, PER_WORD)
        return code_RWp[..., AWQ_PLACES].reshape(len(word_RW), -1)

    return Codes(codes(parts["qweight"]).T, codes(parts["qzeros"]).T, parts["scales"].T)


def read_gptq(parts: Arrays, unpacked: Callable[[np.ndarray], np.ndarray], first_zero: int) -> Codes:
    """qweight i32 [I/8, O], qzeros i32 [Q, O/8], scales [Q, O]; of 8 bits a quarter instead of an eighth.

    Args:
        unpacked: the codes of words.
        first_zero: what a stored zero of 0 means.
    """
    zero_OQ = unpacked(parts["qzeros"]).T + np.uint8(first_zero)
    return Codes(unpacked(parts["qweight"].T), zero_OQ, parts["scales"].T)


def read_packed(parts: Arrays) -> Codes:
    """weight_packed i32 [O, I/8] and weight_scale [O, Q]; codes are stored with 8 added."""
    scale_OQ = parts["weight_scale"]
    return Codes(nibbles(parts["weight_packed"]), np.full(scale_OQ.shape, 8, np.uint8), scale_OQ)


def read_packed_with_zeros(parts: Arrays) -> Codes:
    """Likewise, and weight_zero_point i32 [O/8, Q], which have 8 added too."""
    zero_OQ = nibbles(parts["weight_zero_point"].T).T
    return Codes(nibbles(parts["weight_packed"]), zero_OQ, parts["weight_scale"])


def read_int8(parts: Arrays) -> Codes:
    """weight i8 [O, I] and weight_scale [O, 1]."""
    scale_O1 = parts["weight_scale"]
    return Codes(parts["weight"], np.zeros(scale_O1.shape, np.int8), scale_O1)


def nibbles(word_RW: np.ndarray) -> np.ndarray:
    """The codes 0..15 of words, lowest bits first: u8 [R, 8 W]."""
    byte = np.ascontiguousarray(word_RW, "<i4").view(np.uint8)
    return np.stack([byte & 15, byte >> 4], axis=-1).reshape(len(word_RW), -1)


def bytes_of(word_RW: np.ndarray) -> np.ndarray:
    """The codes 0..255 of words, lowest bits first: u8 [R, 4 W]."""
    return np.ascontiguousarray(word_RW, "<i4").view(np.uint8)


def decode(codes: Codes, group_I: np.ndarray | None = None) -> np.ndarray:
    """Float32 [O, I]. `group_I`: the group of each input; default: equal shares, in order."""
    code_OI, zero_OQ, scale_OQ = codes
    (O, I), Q = code_OI.shape, scale_OQ.shape[1]
    weight_OI = code_OI.astype(np.float32, order="C")
    zero_OQ, scale_OQ = zero_OQ.astype(np.float32), scale_OQ.astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinities and NaNs are told when weights are loaded, with the tensor's name
        if group_I is None:
            weight_OQi = weight_OI.reshape(O, Q, I // Q)  # a view
            weight_OQi -= zero_OQ[:, :, None]
            weight_OQi *= scale_OQ[:, :, None]
        else:
            weight_OI -= zero_OQ[:, group_I]
            weight_OI *= scale_OQ[:, group_I]
    return weight_OI


@dataclass(frozen=True)
class Matrix:
    """A quantised weight."""

    shape: tuple[int, int]
    """[O, I]"""
    parts: dict[str, str]
    """what the format calls its tensors -> their names in the checkpoint"""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the quantised matrices of a checkpoint lie in its files."""

    where: str
    """the config.json that says so"""
    stored: Quantization
    is_kept: bool = True
    """whether the engine has such codes; else they are widened to floats"""
    kind: str = "int8 in groups"
    """in the log, of what is widened"""
    marker: str
    """a tensor that every quantised module has, and no other"""
    codes: str
    """the tensor that tells the matrix's shape"""
    shape_of: Callable[[int, int], tuple[int, int]]
    """the codes' shape -> [O, I]"""
    parts_of: Callable[[int, int, int], Shapes]
    """O, I, Q -> what a module's tensors have to be"""
    group_index: str | None = None
    """one that may be missing: i32 [I], the group of each input"""
    read: Callable[[Arrays], Codes]

    @property
    def quantization(self) -> Quantization | None:
        """None: they count as floats."""
        return self.stored if self.is_kept else None

    def matrices(self, shapes: Shapes, stored: Callable[[str], np.ndarray]) -> dict[str, Matrix]:
        """Every quantised weight that these tensors make, by its parameter's name. `stored` reads one of them.

        Raises RefusedError when a module's tensors are not all there, or do not fit each other.
        """
        modules = [name.removesuffix(self.marker) for name in shapes if name.endswith(f".{self.marker}")]
        return {module + WEIGHT: self._matrix(module, shapes) for module in modules}

    def _matrix(self, module: str, shapes: Shapes) -> Matrix:
        at = shapes.get(module + self.codes, ())
        if len(at) != 2:
            raise self._refused(f"needs a matrix {module}{self.codes} beside {module}{self.marker}")
        O, I = self.shape_of(*at)
        group = self.stored.group or I
        needed = {module + part: shape for part, shape in self.parts_of(O, I, -(-I // group)).items()}
        if self.group_index is not None and module + self.group_index in shapes:
            needed[module + self.group_index] = (I,)
        for name, shape in needed.items():
            if shapes.get(name) != shape:
                there = f"is {shapes[name]}" if name in shapes else "is missing"
                raise self._refused(f"wants {name} to be {shape}, but it {there}")
        return Matrix((O, I), {name.removeprefix(module): name for name in needed})

    def floats(self, matrix: Matrix, arrays: Arrays) -> np.ndarray:
        """Float32 [O, I]. Raises RefusedError when groups are in an order that the config denies."""
        I = matrix.shape[1]
        group = self.stored.group or I
        in_order_I = np.arange(I) // group
        group_I = arrays.get(self.group_index, in_order_I) if self.group_index else in_order_I
        if not np.array_equal(group_I, in_order_I):
            name = matrix.parts[self.group_index or ""]
            if not self.stored.act_order:
                raise self._refused(f"says that groups lie in order, but {name} has another one")
            if group_I.min() < 0 or group_I.max() > in_order_I[-1]:
                raise self._refused(f"has {in_order_I[-1] + 1} groups, but {name} names others")
            return decode(self.read(arrays), group_I)
        return decode(self.read(arrays), in_order_I if I % group else None)

    def _refused(self, what: str) -> RefusedError:
        return RefusedError(f"{self.where!r} {what}; fetch the model anew")
