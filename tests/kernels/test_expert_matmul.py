"""Rows times the experts that they chose: bit for bit the products of each expert alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import expert_matmul, panel_matmul
from slipstream.kernels.panel_matmul import Panels, pack, pack_blocks, pack_int8, unpack

from . import oracle

E, I, O = 5, 64, 70
MULTIPLY = jax.jit(expert_matmul, static_argnames=("outputs", "backend"))
CHOSEN = {
    "one row": np.array([[3, 0]]),
    "a row that names one twice": np.array([[2, 2, 1]]),
    "an expert that nobody chose": np.array([[0, 4], [3, 0], [0, 3]]),
    "more rows than a part has": np.full((170, 1), 3),
    "many": np.random.default_rng(0).integers(0, E, (90, 3)),
}


def one_expert(form, number):
    rng = np.random.default_rng(number)
    weight_OI = jnp.asarray(oracle.normal(number, O, I))
    scale_OQ = jnp.asarray(rng.normal(size=(O, I // 32)), jnp.float16)
    if form == "int8":
        return pack_int8(jnp.asarray(rng.integers(-128, 128, (O, I), np.int8)), jnp.asarray(oracle.normal(9, O)))
    if form == "blocks8":
        return pack_blocks(jnp.asarray(rng.integers(-128, 128, (O, I), np.int8)), scale_OQ, None, 8)
    if form == "blocks4":
        return pack_blocks(jnp.asarray(rng.integers(0, 16, (O, I), np.int8)), scale_OQ, scale_OQ * 3, 4)
    if form == "table":
        return pack_blocks(jnp.asarray(rng.integers(0, 16, (O, I), np.int8)), scale_OQ, None, 4, tuple(range(-9, 7)))
    return pack(weight_OI, jnp.dtype(form))


def stacked(experts):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "int8", "blocks8", "blocks4", "table"])
def test_an_experts_product_is_that_of_its_panels(form):
    experts = [one_expert(form, number) for number in range(E)]
    for told, expert_RX in CHOSEN.items():
        x_RI = jnp.asarray(oracle.normal(7, len(expert_RX), I))
        out_RXO = MULTIPLY(x_RI, jnp.int32(expert_RX), stacked(experts), outputs=O, backend="native_cpu")
        assert out_RXO.shape == (*expert_RX.shape, O)
        of_all = np.stack([panel_matmul(x_RI, one, outputs=O, backend="native_cpu") for one in experts])
        np.testing.assert_array_equal(out_RXO, of_all[expert_RX, np.arange(len(expert_RX))[:, None]], told)


@pytest.mark.parametrize("backend", ["native_cpu", "xla"])
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_inputs_in_bfloat16(form, backend):
    """Against float64; bfloat16 with an odd number of inputs too."""
    experts = [one_expert(form, number) for number in range(E)]
    inputs = I - 1 if form == "bfloat16" else I
    if form == "bfloat16":
        experts = [pack(unpack(one, O, I)[:, :inputs], jnp.bfloat16) for one in experts]
    expert_RX = CHOSEN["many"]
    x_RI = jnp.asarray(oracle.normal(7, len(expert_RX), inputs), jnp.bfloat16)
    out_RXO = MULTIPLY(x_RI, jnp.int32(expert_RX), stacked(experts), outputs=O, backend=backend)
    weight_EOI = np.stack([np.float64(unpack(one, O, inputs)) for one in experts])
    expected_RXO = np.einsum("ri,rxoi->rxo", np.float64(x_RI), weight_EOI[expert_RX])
    np.testing.assert_allclose(out_RXO, expected_RXO, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native_cpu", "xla"])
def test_padding_is_left_out(backend):
    """It is NaN, names experts that there are not, and gives zeros."""
    experts = stacked([one_expert("float32", number) for number in range(E)])
    expert_RX, x_RI = CHOSEN["many"], jnp.asarray(oracle.normal(7, 90, I))
    expected_RXO = MULTIPLY(x_RI, jnp.int32(expert_RX), experts, outputs=O, backend=backend)
    for is_live_R in (np.arange(90) % 7 < 3, np.arange(90) < 1, np.zeros(90, bool)):
        padded_RI, padded_RX = (np.where(is_live_R[:, None], *of) for of in ((x_RI, np.nan), (expert_RX, -7)))
        args = jnp.asarray(padded_RI), jnp.int32(padded_RX), experts, jnp.asarray(is_live_R)
        out_RXO = MULTIPLY(*args, outputs=O, backend=backend)
        np.testing.assert_array_equal(out_RXO, jnp.where(is_live_R[:, None, None], expected_RXO, 0))


def test_what_nobody_chose_is_not_read():
    """It is NaN, and so is what fills the last panel up."""
    experts = [one_expert("float32", number) for number in range(E)]
    filled = jnp.arange(96).reshape(-1, 1, 32) >= O
    experts = [Panels(jnp.where(filled | (number == 2), jnp.nan, one.code)) for number, one in enumerate(experts)]
    expert_RX = jnp.int32([[0, 4], [3, 0], [1, 3]])
    out_RXO = MULTIPLY(
        jnp.asarray(oracle.normal(7, 3, I)), expert_RX, stacked(experts), outputs=O, backend="native_cpu"
    )
    assert np.isfinite(out_RXO).all()


@pytest.mark.parametrize("expert", [-1, E])
def test_an_expert_that_there_is_not_is_an_error(expert):
    weight = stacked([one_expert("float32", number) for number in range(E)])
    with pytest.raises(jax.errors.JaxRuntimeError, match="an expert that there is not"):
        MULTIPLY(jnp.ones((1, I)), jnp.int32([[expert]]), weight, outputs=O, backend="native_cpu").block_until_ready()


def test_what_does_not_fit_is_refused():
    weight = stacked([one_expert("float32", number) for number in range(E)])
    x_RI, expert_RX = jnp.ones((2, I)), jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="expert_RX must be int32, got float32"):
        MULTIPLY(x_RI, jnp.zeros((2, 1)), weight, outputs=O, backend="native_cpu")
    with pytest.raises(ValueError, match=r"expert_RX must be \[R, X\] = \(2, 1\), got \(3, 1\)"):
        MULTIPLY(x_RI, jnp.zeros((3, 1), jnp.int32), weight, outputs=O, backend="native_cpu")
    with pytest.raises(ValueError, match=r"code must be \[P, I, X\] = \(4, 64, 32\), got \(3, 64, 32\)"):
        MULTIPLY(x_RI, expert_RX, weight, outputs=128, backend="native_cpu")
    with pytest.raises(ValueError, match="x_RI must be float32, got bfloat16"):
        MULTIPLY(x_RI.astype(jnp.bfloat16), expert_RX, weight, outputs=O, backend="native_cpu")
