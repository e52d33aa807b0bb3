"""Attention sinks: a learned score of each head that takes weight away from the keys, in both kernels' backends."""

import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import chunk_attention, ragged_attention

from . import oracle
from .test_chunk_attention import Case
from .test_ragged_attention import LAYER, R, attend, by_hand, cached_by_hand, inputs, quantised

BACKENDS = ["xla", "xla_gpu", "native_cpu", pytest.param("pallas_interpret", marks=pytest.mark.slow)]
CHUNKS = ["xla", "xla_gpu", pytest.param("pallas_interpret", marks=pytest.mark.slow)]


def sinks(heads):
    """Some far above the scores, some far below."""
    return np.linspace(-20, 20, heads, dtype=np.float32)


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "native_cpu", "pallas_interpret"])
def test_a_step_by_hand(mesh, backend):
    """Scores 0 for the cached row, log 3 for the new one and log 4 for the sink: weights 1/8, 3/8, and nothing."""
    H, S = 64, 128
    q_BWNH = by_hand(8.0, 0.0, H)[None, None, None, :H]  # times H**-0.5 is 1
    new_BWKC, cache_LBKSC = by_hand(np.log(3.0), 4.0, H)[None, None, None], cached_by_hand(0.0, 8.0, H, S)
    args = (q_BWNH, new_BWKC, cache_LBKSC, 0, np.array([1], np.int32))
    out_BWNH = attend(*args, sink_N=np.array([np.log(4.0)], np.float32), mesh=mesh, backend=backend)
    np.testing.assert_allclose(out_BWNH, np.full((1, 1, 1, H), 2.5), rtol=1e-6)


@pytest.mark.parametrize(("window", "W"), [(None, 1), (130, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step(mesh, backend, window, W):
    """Each query head has its own, the same for all tokens; a dead slot's new tokens share with it, too."""
    sink_N = sinks(6)
    lengths = [0, 1, R, R + 1, 3 * R - 2]
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs(lengths, 3 * R, 2, 3, 64, jnp.float32, window=window, W=W)
    args = (q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B)
    out_BWNH = attend(*args, window=window, sink_N=sink_N, mesh=mesh, backend=backend)
    oracle.assert_close(out_BWNH, oracle.ragged_attention(*args, window=window, sink_N=sink_N))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_over_int8_rows(mesh, backend):
    """Scores are multiplied by k's scale, and the sink is not."""
    sink_N = sinks(4)
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([0, 100, 2 * R], 2 * R, 2, 2, 64, jnp.float32)
    codes, scales, meant = quantised(np.asarray(cache_LBKSC))
    args = (q_BWNH, new_BWKC, codes, LAYER, length_B)
    out_BWNH = attend(*args, scale_LBK2S=scales, sink_N=sink_N, mesh=mesh, backend=backend)
    oracle.assert_close(out_BWNH, oracle.ragged_attention(q_BWNH, new_BWKC, meant, LAYER, length_B, sink_N=sink_N))


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("backend", CHUNKS)
def test_a_chunk(mesh, backend, window):
    sink_N = sinks(6)
    case = Case([2 * R, 0], 144, 2, 3, 64, window=window)
    out_TNH = case.attend(backend, mesh, sink_N=sink_N)
    oracle.assert_close(out_TNH, case.expected(sink_N=sink_N))


def test_a_small_chunk_on_tpus(mesh):
    """Heads of 128, whose values are cut off their rows, in bf16."""
    sink_N = sinks(4)
    case = Case([R], 16, 1, 4, 128, jnp.bfloat16)
    oracle.assert_close(case.attend("pallas_interpret", mesh, sink_N=sink_N), case.expected(sink_N=sink_N))


def test_chips_have_their_own_heads_sinks(mesh, mesh_of_8):
    sink_N = sinks(16)
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([100, R], R, 8, 2, 64, jnp.float32)
    args, case = (q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B), Case([R, 0], 64, 8, 2, 64)
    one, eight = (attend(*args, sink_N=sink_N, mesh=over, backend="xla") for over in (mesh, mesh_of_8))
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    one, eight = (case.attend("xla", over, sink_N=sink_N) for over in (mesh, mesh_of_8))
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)


def test_sinks_of_other_heads_are_refused(mesh):
    where = {"sink_N": jnp.zeros(2), "mesh": mesh, "backend": "xla"}
    cache_LPKRC, start_M, page_MJ = jnp.zeros((1, 2, 2, R, 128)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32)
    x_TNH, x_TKH = jnp.zeros((1, 4, 64)), jnp.zeros((1, 2, 64))
    with pytest.raises(ValueError, match=r"sink_N must be \[N\] = \(4,\), got \(2,\)"):
        ragged_attention(x_TNH[None], jnp.zeros((1, 1, 2, 128)), cache_LPKRC, 0, start_M, page_MJ, **where)
    with pytest.raises(ValueError, match=r"sink_N must be \[N\] = \(4,\), got \(2,\)"):
        chunk_attention(x_TNH, x_TKH, x_TKH, cache_LPKRC, 0, start_M, page_MJ, **where)
