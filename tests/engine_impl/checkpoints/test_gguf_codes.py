"""Codes of GGUF tensors as panels hold them are, bit for bit, what the gguf package makes of the tensors."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.checkpoints.gguf_codes import FLOATS, codes_of, compact_of
from slipstream.kernels import columns, pack, pack_blocks, unpack

KINDS = gguf.GGMLQuantizationType
CODED = [kind for kind in KINDS if kind not in FLOATS and compact_of(kind)]
HALVES = {
    KINDS.Q4_0: (0,), KINDS.Q4_1: (0, 2), KINDS.Q5_0: (0,), KINDS.Q5_1: (0, 2), KINDS.Q8_0: (0,), KINDS.Q2_K: (80, 82),
    KINDS.Q3_K: (108,), KINDS.Q4_K: (0, 2), KINDS.Q5_K: (0, 2), KINDS.Q6_K: (208,),
}  # fmt: skip
"""Where a block has its float16 numbers (bytes)."""
O = 40


def random_rows(kind):
    """Every byte at random, but for float16 numbers of all magnitudes: zeros, subnormal ones and large ones too."""
    rng, (inputs, size) = np.random.default_rng(int(kind)), gguf.GGML_QUANT_SIZES[kind]
    blocks = 512 // inputs
    stored = rng.integers(0, 256, (O, blocks, size), np.uint8)
    stored[0], stored[1] = 0, 255
    for at in HALVES[kind]:
        half = (rng.normal(size=(O, blocks)) * 2.0 ** rng.integers(-24, 11, (O, blocks))).astype(np.float16)
        half[2], half[3], half[4] = 0, 2**-24, -(2**-14)
        stored[..., at : at + 2] = half[..., None].view(np.uint8)
    return stored.reshape(O, -1)


def test_these_kinds_have_codes():
    assert set(CODED) == set(HALVES)
    assert compact_of(KINDS.F32) is compact_of(KINDS.IQ4_XS) is None


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
def test_panels_of_codes_equal_what_is_dequantised(kind):
    stored, form = random_rows(kind), compact_of(kind)
    assert form is not None
    codes = codes_of(stored, kind)
    assert (codes.code.dtype, codes.scale.dtype, codes.offset is not None) == (np.int8, form.grid, form.has_offset)
    assert codes.scale.shape == (O, 512 // form.block)
    panels = pack_blocks(*codes, bits=4 if form.kind == "4-bit" else 8)
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
