import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import prefill_attention

from . import oracle

ATTEND = jax.jit(prefill_attention, static_argnames=("mesh", "backend"))


def inputs(T, N, K, H, dtype):
    return tuple(oracle.normal(i, T, heads, H, dtype=dtype) for i, heads in enumerate((N, K, K)))


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
@pytest.mark.parametrize(
    ("T", "N", "K", "H", "dtype"),
    [
        (16, 9, 3, 64, jnp.float32),
        pytest.param(128, 4, 1, 128, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(200, 2, 2, 64, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_causal_attention(mesh, backend, T, N, K, H, dtype):
    args = inputs(T, N, K, H, dtype)
    oracle.assert_close(ATTEND(*args, mesh=mesh, backend=backend), oracle.prefill_attention(*args))


@pytest.mark.parametrize("T", [256, 300, 512])
def test_reference_chunks(mesh, T):
    """Queries in chunks of 256: a chunk's end is every key's last chance."""
    args = inputs(T, 3, 1, 64, jnp.float32)
    oracle.assert_close(ATTEND(*args, mesh=mesh, backend="xla"), oracle.prefill_attention(*args))


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
def test_padding_changes_no_real_row(mesh, backend):
    """Causality alone keeps the padding out: it may hold anything finite."""
    q_TNH, k_TKH, v_TKH = inputs(32, 2, 1, 64, jnp.float32)
    padding_T11 = (jnp.arange(32) >= 20)[:, None, None]
    padded = tuple(jnp.where(padding_T11, 1e4, x) for x in (q_TNH, k_TKH, v_TKH))
    out_TNH = ATTEND(*padded, mesh=mesh, backend=backend)[:20]
    oracle.assert_close(out_TNH, oracle.prefill_attention(q_TNH, k_TKH, v_TKH)[:20])


def test_sharded_equals_one_device(mesh, mesh_of_8):
    args = inputs(16, 16, 8, 64, jnp.float32)
    one = ATTEND(*args, mesh=mesh, backend="xla")
    eight = ATTEND(*args, mesh=mesh_of_8, backend="xla")
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": (16, 2, 32)}, "k_TKH must be"), ({"v": (16, 1, 64)}, "v_TKH must be"), ({"q": (16, 3, 64)}, "divisible")],
)
def test_refuses(mesh, change, message):
    shapes = {"q": (16, 4, 64), "k": (16, 2, 64), "v": (16, 2, 64)} | change
    with pytest.raises(ValueError, match=message):
        prefill_attention(*(jnp.zeros(shape) for shape in shapes.values()), mesh=mesh, backend="xla")
