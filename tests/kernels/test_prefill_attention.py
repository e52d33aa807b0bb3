import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import prefill_attention

from . import oracle

ATTEND = jax.jit(prefill_attention, static_argnames=("window", "soft_cap", "mesh", "backend"))


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


@pytest.mark.parametrize(
    ("backend", "T", "window", "soft_cap"),
    [
        ("xla", 16, 1, None),
        ("xla", 16, 5, 2.0),
        ("xla", 600, 255, None),
        ("xla", 600, 256, 2.0),
        ("xla", 600, 257, None),
        ("xla", 600, 600, 2.0),
        ("xla", 600, 2000, None),
        ("pallas_interpret", 200, 70, 2.0),
        pytest.param("pallas_interpret", 200, 1, None, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 384, 128, None, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 384, 129, None, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 200, 200, 2.0, marks=pytest.mark.slow),
    ],
)
def test_window_and_soft_cap(mesh, backend, T, window, soft_cap):
    """One key too many or too few, at chunks' and blocks' borders; a cap that scores of 10 notice."""
    q_TNH, k_TKH, v_TKH = inputs(T, 2, 1, 64, jnp.float32)
    args = (q_TNH * 10, k_TKH, v_TKH)
    out_TNH = ATTEND(*args, window=window, soft_cap=soft_cap, mesh=mesh, backend=backend)
    oracle.assert_close(out_TNH, oracle.prefill_attention(*args, window=window, soft_cap=soft_cap))


def test_a_short_window_is_less_work(mesh):
    """Chunks that nobody sees are not computed."""

    def flops(window):
        args = inputs(2048, 2, 1, 64, jnp.float32)
        lowered = ATTEND.lower(*args, window=window, mesh=mesh, backend="xla")
        costs = lowered.compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    assert flops(256) < 0.5 * flops(None)


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
