"""Weights in panels as kernels/panel_matmul/reference.py defines them; their products in C++ are test_native's."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from slipstream.kernels.panel_matmul import (
    PANEL,
    Panels,
    columns,
    pack,
    pack_blocks,
    pack_int4,
    pack_int8,
    panel_matmul,
    unpack,
)

from . import oracle

OUTPUTS = np.array([0, 15, 16, 31, 32, 69])


def check_holds(panels, weight_OI, *, rtol=0.0, atol=0.0):
    """All of it, some of its outputs, and its product."""
    (O, I), weight_OI = weight_OI.shape, weight_OI.astype(np.float64)
    np.testing.assert_allclose(unpack(panels, O, I), weight_OI, rtol=rtol, atol=atol)
    assert np.array_equal(columns(panels, jnp.asarray(OUTPUTS), I), unpack(panels, O, I)[OUTPUTS])
    x_RI = oracle.normal(7, 3, I)
    out_RO = panel_matmul(jnp.asarray(x_RI), panels, outputs=O, backend="xla")
    expected_RO = np.asarray(x_RI, np.float64) @ weight_OI.T
    np.testing.assert_allclose(out_RO, expected_RO, rtol=1e-5, atol=1e-5 * np.abs(expected_RO).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_they_hold_the_weight(dtype):
    weight_OI = oracle.normal(0, 70, 5, dtype=dtype)
    panels = pack(jnp.asarray(weight_OI, jnp.float32), dtype)
    assert panels.code.shape == ((3, 3, PANEL, 2) if dtype == jnp.bfloat16 else (3, 5, PANEL))
    check_holds(panels, np.asarray(weight_OI, np.float32))


def test_they_hold_codes_of_outputs():
    rng = np.random.default_rng(0)
    code_OI, scale_O = rng.integers(-128, 128, (70, 6), np.int8), rng.uniform(1, 2, 70).astype(np.float32)
    panels = pack_int8(jnp.asarray(code_OI), jnp.asarray(scale_O))
    assert [leaf.shape for leaf in panels[:2]] == [(3, 6, PANEL), (3, PANEL)]
    check_holds(panels, code_OI.astype(np.float64) * scale_O[:, None], rtol=1e-6)


@pytest.mark.parametrize("block", [2, 16, 32])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("bits", "least", "has_offset"), [(8, -128, False), (8, -128, True), (4, 0, True)])
def test_they_hold_codes_of_blocks(bits, least, has_offset, dtype, block):
    """By hand, code * scale + offset; scales of 11 significant bits, as float16 has, make that one rounding."""
    rng, (O, Q) = np.random.default_rng(0), (70, 3)
    code_OI = rng.integers(least, least + 2**bits, (O, Q * block), np.int16).astype(np.int8)
    scale_OQ, offset_OQ = (rng.normal(size=(2, O, Q)) * 10.0 ** rng.integers(-6, 3, (2, O, Q))).astype(np.float16)
    scale_OQ[0, 0] = 0
    grids = [jnp.asarray(grid_OQ.astype(dtype)) for grid_OQ in (scale_OQ, offset_OQ)]
    panels = pack_blocks(jnp.asarray(code_OI), grids[0], grids[1] if has_offset else None, bits)
    assert panels.code.shape == (3, Q * block * bits // 8, PANEL)
    assert panels.scale is not None
    assert (panels.scale.shape, panels.scale.dtype) == ((3, Q, PANEL), dtype)
    scale_OI, offset_OI = (grid_OQ.astype(np.float64).repeat(block, axis=1) for grid_OQ in (scale_OQ, offset_OQ))
    weight_OI = (code_OI * scale_OI + (offset_OI if has_offset else 0)).astype(np.float32)
    assert np.array_equal(unpack(panels, O, Q * block), weight_OI)
    check_holds(panels, weight_OI)


def test_they_hold_the_codes_of_int4():
    """From -8 to 7 in a `Blockwise` weight, from 0 to 15 here."""
    rng = np.random.default_rng(0)
    code_IO = rng.integers(-8, 8, (16, 70), np.int8)
    scale_QO, offset_QO = rng.uniform(1, 2, (2, 2, 70)).astype(np.float32)
    packed = (code_IO[::2] & 15) | (code_IO[1::2] << 4)
    panels = pack_int4(*map(jnp.asarray, (packed, scale_QO, offset_QO)))
    assert [leaf.shape for leaf in panels[:3]] == [(3, 8, PANEL), (3, 2, PANEL), (3, 2, PANEL)]
    check_holds(panels, (code_IO * scale_QO.repeat(8, axis=0) + offset_QO.repeat(8, axis=0)).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [2, 32, 96])
def test_they_hold_floats_of_8_bits(block):
    """Every code but NaN, times a scale of 24 significant bits, rounded once."""
    rng, (O, I) = np.random.default_rng(0), (70, 96)
    code_OI = rng.integers(0, 256, (O, I)).astype(np.uint8)
    code_OI[code_OI & 127 == 127] = 0x80
    scale_OQ = rng.uniform(0.5, 2, (O, I // block)).astype(np.float32)
    panels = pack_blocks(jnp.asarray(code_OI.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(scale_OQ), None, 8)
    assert panels.code.dtype == jnp.float8_e4m3fn
    check_holds(panels, code_OI.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_OQ.repeat(block, axis=1))


def test_two_inputs_of_a_byte_are_unsigned_and_in_order():
    code_OI = jnp.asarray([[15, 0, 8, 7]], jnp.int8)
    panels = pack_blocks(code_OI, jnp.ones((1, 1)), jnp.zeros((1, 1)), 4)
    assert panels.code[0, :, 0].tolist() == [0x0F, 0x78]
    assert unpack(panels, 1, 4).tolist() == [[15, 0, 8, 7]]


def test_padding_is_told_by_a_bool_of_each_row():
    x_RI, panels = jnp.zeros((2, 64)), pack(jnp.zeros((30, 64)), jnp.float32)
    for is_live_R, message in (
        (jnp.ones(2, jnp.int32), "is_live_R must be bool, got int32"),
        (jnp.ones(3, bool), r"is_live_R must be \[R\] = \(2,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            panel_matmul(x_RI, panels, None, is_live_R, outputs=30, backend="native_cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 64), jnp.bfloat16)}, "x_RI must be float32, got bfloat16"),
        (
            {"x": jnp.zeros((2, 64), jnp.bfloat16), "code": jnp.zeros((1, 64, 32), jnp.float16)},
            "x_RI must be float32, got bfloat16",
        ),
        (
            {"x": jnp.zeros((2, 64), jnp.float16), "code": jnp.zeros((1, 32, 32, 2), jnp.bfloat16)},
            "x_RI must be float32 or bfloat16, got float16",
        ),
        (
            {"x": jnp.zeros((2, 63), jnp.bfloat16), "code": jnp.zeros((1, 63, 32), jnp.bfloat16)},
            r"code must be \[P, I, X, 2\] = \(1, 32, 32, 2\), got \(1, 63, 32\)",
        ),
        (
            {"code": jnp.zeros((1, 64, 32), jnp.int16)},
            r"float32, bfloat16 or float16, or int8 codes .*, got \['int16'\]",
        ),
        ({"code": jnp.zeros((1, 64, 32), jnp.int8)}, r"got \['int8'\]"),
        ({"outputs": 33}, r"code must be \[P, I, X\] = \(2, 64, 32\), got \(1, 64, 32\)"),
        ({"x": jnp.zeros((2, 63))}, r"= \(1, 63, 32\)"),
        (
            {
                "code": jnp.zeros((1, 64, 32), jnp.int8),
                "scale": jnp.zeros((1, 2, 32), jnp.float16),
                "offset": jnp.zeros((1, 2, 32)),
            },
            r"got \['int8', 'float16', 'float32'\]",
        ),
        (
            {"code": jnp.zeros((1, 64, 32), jnp.int8), "scale": jnp.zeros((1, 32), jnp.float16)},
            r"float32 scales of outputs.*got \['int8', 'float16'\]",
        ),
        (
            {"code": jnp.zeros((1, 32, 32), jnp.int8), "scale": jnp.zeros((1, 2, 32))},
            r"code must be \[P, I, X\] = \(1, 64, 32\)",
        ),
        (
            {"code": jnp.zeros((1, 64, 32), jnp.int8), "scale": jnp.zeros((2, 32))},
            r"scale must be \[P, X\] = \(1, 32\)",
        ),
        (
            {"code": jnp.zeros((1, 32, 32), jnp.int8), "scale": jnp.zeros((1, 2, 32)), "offset": jnp.zeros((1, 1, 32))},
            r"offset must be \[P, Q, X\] = \(1, 2, 32\)",
        ),
        (
            {"code": jnp.zeros((1, 32, 32), jnp.int8)} | dict.fromkeys(("scale", "offset"), jnp.zeros((1, 64, 32))),
            "inputs=64 in blocks=64",
        ),
        (
            {"x": jnp.zeros((2, 96)), "code": jnp.zeros((1, 96, 32), jnp.int8), "scale": jnp.zeros((1, 2, 32))},
            "inputs=96 in blocks=2: a block must be whole, even, and all inputs, a divisor of 256 or a multiple of it",
        ),
        (
            {"code": jnp.zeros((1, 64, 32), jnp.float8_e4m3fn), "scale": jnp.zeros((1, 32))},
            r"got \['float8_e4m3fn', 'float32'\]",
        ),
        (
            {"code": jnp.zeros((1, 32, 32), jnp.int8), "table": jnp.zeros(16, jnp.int8)}
            | dict.fromkeys(("scale", "offset"), jnp.zeros((1, 2, 32))),
            "scales of blocks and an int8 table, or float8_e4m3fn with scales of blocks, got",
        ),
        (
            {
                "code": jnp.zeros((1, 32, 32), jnp.int8),
                "scale": jnp.zeros((1, 2, 32)),
                "table": jnp.zeros(8, jnp.int8),
            },
            r"table must be \[T\] = \(16,\), got \(8,\)",
        ),
    ],
)
def test_refuses(change, message):
    args = {"x": jnp.zeros((2, 64)), "code": jnp.zeros((1, 64, 32)), "scale": None, "offset": None}
    args |= {"table": None, "outputs": 30}
    x_RI, *panels, outputs = (args | change).values()
    with pytest.raises(ValueError, match=message):
        panel_matmul(x_RI, Panels(*panels), outputs=outputs, backend="native_cpu")
