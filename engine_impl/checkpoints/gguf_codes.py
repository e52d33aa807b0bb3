"""What GGUF's quantised tensors hold: codes, with a scale and perhaps an offset for each block of inputs.

A value is code * scale + offset, or a table's value * scale. In float32 such a product is exact for all that are here
(24 significant bits at most), so that a value is rounded once, as the `gguf` package rounds it when it dequantises: bit
for bit the same. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, decoding as in
`gguf.quants.*.dequantize_blocks`.

n blocks of the file, in each of which one or several blocks of inputs share a scale.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from .by_rows import by_rows, empty
from .contract import Codes, Compact
from .mxfp4 import COMPACT as MXFP4

KINDS = gguf.GGMLQuantizationType
FLOATS = {KINDS.F16: Compact("float16"), KINDS.BF16: Compact("bfloat16")}

_HALF = ("d", "<f2")
_LEAST = ("dmin", "<f2")


@dataclass(frozen=True)
class _Layout:
    """A block of the file."""

    fields: list[tuple]
    compact: Compact
    read: Callable[[np.ndarray, Codes], None]
    """fills code [n, inputs], scale and offset [n, blocks] from what `fields` names"""


def compact_of(kind: KINDS) -> Compact | None:
    """The form in memory that holds a tensor of this kind exactly; None: only float32 does, or nothing."""
    return FLOATS.get(kind) or (_LAYOUTS[kind].compact if kind in _LAYOUTS else None)


def codes_of(stored: np.ndarray, kind: KINDS) -> Codes:
    """Of the rows of a matrix, u8 as they lie in the file; of a kind whose `compact_of` are codes."""
    layout = _LAYOUTS[kind]
    dtype, inputs = np.dtype(layout.fields), gguf.GGML_QUANT_SIZES[kind][0]
    block_nX = stored.view(dtype)
    (O, N), compact = block_nX.shape, layout.compact
    blocks = inputs // compact.block
    grid = np.dtype(compact.grid)
    out = Codes(
        empty((O, N * inputs), np.dtype(np.int8)),
        empty((O, N * blocks), grid),
        empty((O, N * blocks), grid) if compact.has_offset else None,
    )

    def read(rows: slice) -> None:
        code, scale, offset = (None if leaf is None else leaf[rows] for leaf in out)
        assert code is not None
        assert scale is not None
        some = block_nX[rows].reshape(-1)
        layout.read(
            some,
            Codes(
                code.reshape(len(some), inputs),
                scale.reshape(len(some), blocks),
                None if offset is None else offset.reshape(len(some), blocks),
            ),
        )

    by_rows(O, out.code.nbytes, read)
    return out


def _nibbles(byte_nj: np.ndarray, code_ni: np.ndarray, group: int) -> None:
    """Of each `group` bytes first all low halves, then all high ones."""
    byte_ngj = byte_nj.reshape(len(byte_nj), -1, group)
    code_ng2j = code_ni.view(np.uint8).reshape(len(byte_nj), -1, 2, group)
    np.bitwise_and(byte_ngj, 15, out=code_ng2j[:, :, 0])
    np.right_shift(byte_ngj, 4, out=code_ng2j[:, :, 1])


def _q4_0(block, out):
    """An offset beyond float16's largest, of weights beyond 65,504, is infinite: whoever loads it refuses it."""
    _nibbles(block["qs"], out.code, 16)
    out.scale[:, 0] = block["d"]
    np.multiply(block["d"], np.float16(-8), out=out.offset[:, 0])


def _q4_1(block, out):
    _nibbles(block["qs"], out.code, 16)
    out.scale[:, 0], out.offset[:, 0] = block["d"], block["dmin"]


def _fifth_bits(block, out):
    _nibbles(block["qs"], out.code, 16)
    fifth_ni = np.unpackbits(block["qh"], axis=-1, bitorder="little").view(np.int8)
    out.code[...] |= fifth_ni << 4


def _q5_0(block, out):
    _fifth_bits(block, out)
    out.code[...] -= 16
    out.scale[:, 0] = block["d"]


def _q5_1(block, out):
    _fifth_bits(block, out)
    out.scale[:, 0], out.offset[:, 0] = block["d"], block["dmin"]


def _q8_0(block, out):
    out.code[...] = block["qs"]
    out.scale[:, 0] = block["d"]


def _times(half_n: np.ndarray, whole_nb: np.ndarray, out_nb: np.ndarray) -> None:
    """A product of a float16 and an integer of 8 bits, which float32 holds."""
    np.multiply(half_n.astype(np.float32)[:, None], whole_nb, out=out_nb, dtype=np.float32)


def _k_grids(block, out):
    scale_nb, least_nb = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(block["scales"]))
    _times(block["d"], scale_nb, out.scale)
    _times(-block["dmin"], least_nb, out.offset)


def _q4_k(block, out):
    _nibbles(block["qs"], out.code, 32)
    _k_grids(block, out)


def _q5_k(block, out):
    _nibbles(block["qs"], out.code, 32)
    code_nbi = out.code.view(np.uint8).reshape(len(block), 8, 32)
    for b in range(8):
        code_nbi[:, b] |= (block["qh"] >> b & 1) << 4
    _k_grids(block, out)


def _q6_k(block, out):
    code_nhqi = out.code.reshape(len(block), 2, 4, 32)
    low_nhji, high_nhi = block["ql"].reshape(-1, 2, 2, 32), block["qh"].reshape(-1, 2, 32)
    for quarter in range(4):
        low_nhi = low_nhji[:, :, quarter % 2] >> 4 * (quarter // 2) & 15
        code_nhqi[:, :, quarter] = (low_nhi | (high_nhi >> 2 * quarter & 3) << 4).view(np.int8) - 32
    _times(block["d"], block["scales"], out.scale)


def _two_bits(block, out):
    byte_nhi = block["qs"].reshape(-1, 2, 32)
    for quarter in range(4):
        out.code.view(np.uint8).reshape(-1, 2, 4, 32)[:, :, quarter] = byte_nhi >> 2 * quarter & 3


def _q2_k(block, out):
    _two_bits(block, out)
    _times(block["d"], block["scales"] & 15, out.scale)
    _times(-block["dmin"], block["scales"] >> 4, out.offset)


def _q3_k(block, out):
    """Codes from -4 to 3, here from 0 to 7: the third bit, where it is there, is what the file takes no 4 off for."""
    _two_bits(block, out)
    code_nbi = out.code.view(np.uint8).reshape(-1, 8, 32)
    for b in range(8):
        code_nbi[:, b] |= (block["hmask"] >> b & 1) << 2
    packed_nj = block["scales"]
    low_nb = np.concatenate([packed_nj[:, :8] & 15, packed_nj[:, :8] >> 4], axis=1)
    high_nb = np.concatenate([packed_nj[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    _times(block["d"], (low_nb | high_nb << 4).view(np.int8) - np.int8(32), out.scale)
    np.multiply(out.scale, np.float32(-4), out=out.offset)


def _iq4_nl(block, out):
    _nibbles(block["qs"], out.code, 16)
    out.scale[:, 0] = block["d"]


def _iq4_xs(block, out):
    """Six bits a scale: four of each in `low`, two in `high`."""
    _nibbles(block["qs"], out.code, 16)
    low_nb = np.stack([block["low"] & 15, block["low"] >> 4], axis=2).reshape(len(block), 8)
    high_nb = block["high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    _times(block["d"], (low_nb | high_nb.astype(np.uint8) << 4).view(np.int8) - np.int8(32), out.scale)


def _mxfp4(block, out):
    """The exponent of two halves; the least two of the 256 are below float32's normal numbers."""
    _nibbles(block["qs"], out.code, 16)
    np.ldexp(np.float32(1), block["exponent"].astype(np.int32) - 128, out=out.scale[:, 0])


def _bytes(name: str, count: int) -> tuple[str, str, tuple[int]]:
    return name, "u1", (count,)


_OF_8, _OF_4 = Compact("8-bit", 32, "float16"), Compact("4-bit", 32, "float16", has_offset=True)
_K_8, _K_4 = Compact("8-bit", 32, "float32", has_offset=True), Compact("4-bit", 32, "float32", has_offset=True)
_OF_8_AND_OFFSET = Compact("8-bit", 32, "float16", has_offset=True)
_IQ4 = gguf.quants.IQ4_NL.kvalues
_K_4_OF_16 = Compact("4-bit", 16, "float32", has_offset=True)
_LAYOUTS: Mapping[KINDS, _Layout] = {
    KINDS.Q4_0: _Layout([_HALF, _bytes("qs", 16)], _OF_4, _q4_0),
    KINDS.Q4_1: _Layout([_HALF, _LEAST, _bytes("qs", 16)], _OF_4, _q4_1),
    KINDS.Q5_0: _Layout([_HALF, _bytes("qh", 4), _bytes("qs", 16)], _OF_8, _q5_0),
    KINDS.Q5_1: _Layout([_HALF, _LEAST, _bytes("qh", 4), _bytes("qs", 16)], _OF_8_AND_OFFSET, _q5_1),
    KINDS.Q8_0: _Layout([_HALF, ("qs", "i1", (32,))], _OF_8, _q8_0),
    KINDS.Q2_K: _Layout([_bytes("scales", 16), _bytes("qs", 64), _HALF, _LEAST], _K_4_OF_16, _q2_k),
    KINDS.Q3_K: _Layout([_bytes("hmask", 32), _bytes("qs", 64), _bytes("scales", 12), _HALF], _K_4_OF_16, _q3_k),
    KINDS.Q4_K: _Layout([_HALF, _LEAST, _bytes("scales", 12), _bytes("qs", 128)], _K_4, _q4_k),
    KINDS.Q5_K: _Layout([_HALF, _LEAST, _bytes("scales", 12), _bytes("qh", 32), _bytes("qs", 128)], _K_8, _q5_k),
    KINDS.Q6_K: _Layout(
        [_bytes("ql", 128), _bytes("qh", 64), ("scales", "i1", (16,)), _HALF], Compact("8-bit", 16, "float32"), _q6_k
    ),
    KINDS.IQ4_NL: _Layout([_HALF, _bytes("qs", 16)], Compact("4-bit", 32, "float16", table=_IQ4), _iq4_nl),
    KINDS.IQ4_XS: _Layout(
        [_HALF, ("high", "<u2"), _bytes("low", 4), _bytes("qs", 128)], Compact("4-bit", 32, table=_IQ4), _iq4_xs
    ),
    KINDS.MXFP4: _Layout([("exponent", "u1"), _bytes("qs", 16)], MXFP4, _mxfp4),
}
