"""Quantised matrices, packed word by word as the formats define it; slow, and with nothing of the readers in it."""

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns lies in a word's lowest bits, the next ones, ..."""


def word(codes, bits=4) -> np.int32:
    """Eight codes 0..15, or four 0..255, the first in the lowest bits."""
    value = 0
    for place, code in enumerate(codes):
        assert 0 <= code < 2**bits
        value |= int(code) << bits * place
    return np.uint32(value).astype(np.int32)


def along_rows(code, order=tuple(range(8)), bits=4) -> np.ndarray:
    """[R, C] -> [R, C/8], or [R, C/4]: neighbours in a row share a word."""
    count = 32 // bits
    starts = range(0, code.shape[1], count)
    return np.array([[word((row[start + i] for i in order[:count]), bits) for start in starts] for row in code])


def along_columns(code, bits=4) -> np.ndarray:
    """[R, C] -> [R/8, C], or [R/4, C]."""
    return np.ascontiguousarray(along_rows(code.T, bits=bits).T)


def awq(code_OI, zero_OQ, scale_OQ):
    return {
        "qweight": along_rows(code_OI.T, AWQ_ORDER),
        "qzeros": along_rows(zero_OQ.T, AWQ_ORDER),
        "scales": np.ascontiguousarray(scale_OQ.T),
    }


def gptq(code_OI, zero_OQ, scale_OQ, stored_zero=lambda zero: zero - 1, bits=4):
    return {
        "qweight": along_columns(code_OI.T, bits),
        "qzeros": along_rows(stored_zero(zero_OQ.T), bits=bits),
        "scales": np.ascontiguousarray(scale_OQ.T),
    }


def gptq_v2(code_OI, zero_OQ, scale_OQ):
    return gptq(code_OI, zero_OQ, scale_OQ, stored_zero=lambda zero: zero)


def packed(code_OI, zero_OQ, scale_OQ):
    """compressed-tensors: signed codes, of which the packed ones are 8 more; here code and zero are that already."""
    return {
        "weight_packed": along_rows(code_OI),
        "weight_scale": scale_OQ,
        "weight_shape": np.array(code_OI.shape, np.int64),
        "weight_zero_point": along_columns(zero_OQ),
    }


def packed_symmetric(code_OI, zero_OQ, scale_OQ):
    assert (zero_OQ == 8).all()
    parts = packed(code_OI, zero_OQ, scale_OQ)
    del parts["weight_zero_point"]
    return parts


def int8(code_OI, zero_OQ, scale_OQ):
    assert (zero_OQ == 0).all()
    return {"weight": code_OI.astype(np.int8), "weight_scale": scale_OQ}
