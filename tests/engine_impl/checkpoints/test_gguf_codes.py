"""Codes of GGUF tensors as panels hold them are, bit for bit, what the gguf package makes of the tensors."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.checkpoints.gguf_codes import FLOATS, codes_of, compact_of
from slipstream.kernels import columns, pack, pack_blocks, unpack

from .gguf_writing import HALVES, random_codes

KINDS = gguf.GGMLQuantizationType
CODED = [kind for kind in KINDS if kind not in FLOATS and compact_of(kind)]
O = 40


def halves(rng, shape):
    """float16 numbers of all magnitudes; zeros, subnormal ones and large ones too."""
    half = (rng.normal(size=shape) * 2.0 ** rng.integers(-24, 11, shape)).astype(np.float16)
    half[2], half[3], half[4] = 0, 2**-24, -(2**-14)
    return half


def test_these_kinds_have_codes():
    assert set(CODED) == set(HALVES)
    assert compact_of(KINDS.F32) is compact_of(KINDS.IQ3_S) is None


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
def test_panels_of_codes_equal_what_is_dequantised(kind):
    form, stored = compact_of(kind), random_codes(np.random.default_rng(kind), kind, (O, 512), halves)
    assert form is not None
    stored[0] = 0
    codes = codes_of(stored, kind)
    assert (codes.code.dtype, codes.scale.dtype, codes.offset is not None) == (np.int8, form.grid, form.has_offset)
    assert codes.scale.shape == (O, 512 // form.block)
    panels = pack_blocks(*codes, bits=4 if form.kind == "4-bit" else 8, table=form.table)
    expected_OI = gguf.quants.dequantize(stored, kind)
    assert np.isfinite(expected_OI).all()
    np.testing.assert_array_equal(unpack(panels, O, 512), expected_OI)
    np.testing.assert_array_equal(columns(panels, jnp.arange(O), 512), expected_OI)


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_panels_of_floats_equal_what_is_dequantised(kind):
    rng = np.random.default_rng(0)
    weight_OI = (rng.normal(size=(O, 64)) * 2.0 ** rng.integers(-24, 11, (O, 64))).astype(np.float32)
    expected_OI = gguf.quants.dequantize(gguf.quants.quantize(weight_OI, kind), kind)
    panels = pack(jnp.asarray(expected_OI), jnp.dtype(FLOATS[kind].kind))
    np.testing.assert_array_equal(unpack(panels, O, 64), expected_OI)
