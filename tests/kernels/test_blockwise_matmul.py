"""int4 weights, unpacked on the way to the multiplier: against numpy, on one device and eight, and for real TPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.compiler.hlo import Program
from slipstream.kernels.blockwise_matmul import Blockwise, blockwise_matmul, unpack

from tests.arrays import array

from ..tpu import abstract, compile_for, memory_of, text_of, tpu_mesh

MATMUL = jax.jit(blockwise_matmul, static_argnames=("split", "mesh", "backend"))


def draw(rng, L, I, O, block, dtype=np.float32):
    """A stack of random weights, and what they stand for in float64 [L, I, O]."""
    code_LIO = rng.integers(-8, 8, (L, I, O), dtype=np.int8)
    packed_LPO = (code_LIO[:, ::2] & 15) | (code_LIO[:, 1::2] << 4)
    scale_LQO, offset_LQO = (rng.normal(size=(L, I // block, O)).astype(dtype) for _ in range(2))
    weight_LIO = code_LIO.astype(np.float64) * scale_LQO.astype(np.float64).repeat(block, axis=1)
    weight_LIO += offset_LQO.astype(np.float64).repeat(block, axis=1)
    return Blockwise(*map(jnp.asarray, (packed_LPO, scale_LQO, offset_LQO))), weight_LIO


def test_the_low_half_of_a_byte_is_the_first_code():
    packed_PO = array([[0x18], [0x7F]], jnp.int8)
    assert unpack(packed_PO).tolist() == [[-8], [1], [-1], [7]]


def test_by_hand(mesh):
    # One output, a block of 8 inputs: codes 0 to 7, scale 2, offset 10.
    packed_LPO = array([[[0x10], [0x32], [0x54], [0x76]]], jnp.int8)
    weight = Blockwise(packed_LPO, jnp.full((1, 1, 1), 2.0), jnp.full((1, 1, 1), 10.0))
    x_RI = jnp.eye(8, dtype=jnp.float32)[array([0, 3, 7])]
    out_RO = blockwise_matmul(x_RI, weight, split=None, mesh=mesh, backend="xla")
    assert out_RO.tolist() == [[10], [16], [24]]


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
@pytest.mark.parametrize(
    ("R", "I", "O", "block"),
    [
        (1, 32, 128, 32),
        (5, 96, 40, 32),
        (8, 256, 256, 128),
        (3, 8, 24, 8),
        pytest.param(16, 8192, 300, 64, marks=pytest.mark.slow),
    ],
)
def test_equals_float64(mesh, backend, R, I, O, block):
    rng = np.random.default_rng(R * I + O)
    weight, weight_LIO = draw(rng, 3, I, O, block)
    x_RI = rng.normal(size=(R, I)).astype(np.float32)
    for layer in (0, 2):
        out_RO = MATMUL(array(x_RI), weight, layer, split=None, mesh=mesh, backend=backend)
        np.testing.assert_allclose(out_RO, x_RI @ weight_LIO[layer], rtol=1e-4, atol=2e-4 * I**0.5)


def test_bfloat16_rounds_no_more_than_its_inputs_do(mesh):
    rng = np.random.default_rng(0)
    weight, weight_LIO = draw(rng, 1, 256, 128, 32, jnp.bfloat16)
    x_RI = rng.normal(size=(4, 256)).astype(jnp.bfloat16)
    exact_RO = x_RI.astype(np.float64) @ weight_LIO[0]
    for backend in ("xla", "pallas_interpret"):
        out_RO = MATMUL(array(x_RI), weight, split=None, mesh=mesh, backend=backend)
        np.testing.assert_allclose(np.asarray(out_RO, np.float64), exact_RO, rtol=0.02, atol=0.02 * exact_RO.std())


@pytest.mark.parametrize("split", ["inputs", "outputs", None])
def test_eight_devices_equal_one(mesh_of_8, split):
    rng = np.random.default_rng(1)
    weight, weight_LIO = draw(rng, 2, 256, 64, 32)
    x_RI = rng.normal(size=(4, 256)).astype(np.float32)
    out_RO = MATMUL(array(x_RI), weight, 1, split=split, mesh=mesh_of_8, backend="xla")
    np.testing.assert_allclose(out_RO, x_RI @ weight_LIO[1], rtol=1e-4, atol=1e-3)


def test_refuses_what_does_not_fit_together(mesh, mesh_of_8):
    weight, _ = draw(np.random.default_rng(2), 1, 96, 40, 32)
    x_RI = jnp.zeros((1, 96))
    multiply = functools.partial(blockwise_matmul, split=None, mesh=mesh, backend="xla")
    with pytest.raises(ValueError, match=r"packed must be i8"):
        multiply(jnp.zeros((1, 94)), weight)
    with pytest.raises(ValueError, match=r"scale must be bfloat16"):
        multiply(x_RI.astype(jnp.bfloat16), weight)
    with pytest.raises(ValueError, match=r"Q=3 \(inputs\) or O=40"):
        blockwise_matmul(x_RI, weight, split="inputs", mesh=mesh_of_8, backend="xla")


@pytest.mark.parametrize(
    ("topology", "R", "I", "O", "split"),
    [
        ("v5e:2x4", 96, 4096, 14336, "outputs"),
        pytest.param("v5e:2x4", 96, 14336, 4096, "inputs", marks=pytest.mark.slow),
        ("v5e:2x4", 8, 12288, 4096, "inputs"),
        pytest.param("v5e:2x4", 512, 4096, 14336, "outputs", marks=pytest.mark.slow),
        pytest.param("v5p:2x2x2", 96, 4096, 14336, "outputs", marks=pytest.mark.slow),
        pytest.param("v6e:2x4", 512, 8192, 28672, "outputs", marks=pytest.mark.slow),
        pytest.param("v5e:2x4", 96, 4096, 12288, "outputs", marks=pytest.mark.slow),
        pytest.param("v4:2x2x1", 96, 4096, 14336, "outputs", marks=pytest.mark.slow),
    ],
)
def test_tpu_program_reads_the_stack_in_place(topology, R, I, O, split):
    mesh, L, block = tpu_mesh(topology), 4, 32
    x_axes = (None, "tensor") if split == "inputs" else ()
    weight_axes = (None, "tensor") if split == "inputs" else (None, None, "tensor")
    leaves: list[Any] = [
        abstract(mesh, (L, I // 2, O), jnp.int8, *weight_axes),
        abstract(mesh, (L, I // block, O), jnp.bfloat16, *weight_axes),
        abstract(mesh, (L, I // block, O), jnp.bfloat16, *weight_axes),
    ]
    weight = Blockwise(*leaves)
    x_RI = abstract(mesh, (R, I), jnp.bfloat16, *x_axes)
    multiply = functools.partial(blockwise_matmul, split=split, mesh=mesh, backend="pallas")
    compiled = compile_for(mesh, multiply, x_RI, weight, abstract(mesh, (), jnp.int32))
    program = Program(text_of(compiled))
    assert program.pallas_calls() == {"blockwise_matmul": 1}
    assert weight.packed.sharding is not None
    of_chip = weight.packed.sharding.shard_shape(weight.packed.shape)
    assert program.copies_of(of_chip, of_chip[1] * of_chip[2], on_chip=True) == []
    assert memory_of(compiled).temp_size_in_bytes < max(of_chip[1] * of_chip[2], 3 * 4 * R * O)
