import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import chunk_attention
from slipstream.kernels.chunk_attention import xla_gpu
from slipstream.kernels.chunk_attention.pallas_tpu import block_and_heads

from tests.arrays import array

from . import oracle

L, LAYER, R = 2, 1, 128
ATTEND = jax.jit(chunk_attention, static_argnames=("soft_cap", "mesh", "backend"))
SIMULATED = pytest.param("pallas_interpret", marks=pytest.mark.slow)
BACKENDS = ["xla", "xla_gpu", "native_cpu", SIMULATED]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small caches have borders of blocks on GPUs too."""
    monkeypatch.setattr(xla_gpu, "BLOCK_ROWS", 2 * R)
    monkeypatch.setattr(xla_gpu, "QUERIES", 96)


class Case:
    """Texts of which `starts` rows are cached and `tokens` more come as a chunk, and what they are to give.

    In the other layers, in pages of no text, in pages behind a start and in those before all queries' windows there is
    NaN, or 99 and NaN for a scale.
    """

    def __init__(self, starts, tokens, K, G, H, dtype=jnp.float32, *, window=None, spread=1, int8=False, rows=R):
        M, J = len(starts), max(max(starts) // rows, 1)
        self.starts, self.tokens, self.window, self.dtype = starts, tokens, window, dtype
        self.q_TNH = oracle.normal(0, M * tokens, K * G, H, dtype=dtype, times=spread)
        self.k_TKH, self.v_TKH = (oracle.normal(seed, M * tokens, K, H, dtype=dtype) for seed in (1, 2))
        self.rows_MKSC = np.array(oracle.normal(3, M, K, J * rows, 2 * H, dtype=dtype)).astype(np.float32)
        self.scale_LPK2R = scale_MK2S = None
        stored = self.rows_MKSC
        if int8:
            half_MKS2H = self.rows_MKSC.reshape(M, K, -1, 2, H)
            half_MKS2H[..., 1, :] *= np.exp2(-np.arange(J * rows) % 7 - 4)[:, None]  # scales that differ by row
            scale_MKS2 = (np.abs(half_MKS2H).max(axis=-1) / 127).astype(np.float32)
            code_MKS2H = (half_MKS2H / scale_MKS2[..., None]).round()
            self.rows_MKSC = (code_MKS2H * scale_MKS2[..., None]).reshape(stored.shape)
            stored, scale_MK2S = code_MKS2H.reshape(stored.shape), scale_MKS2.swapaxes(-1, -2)
        page_MJ = np.random.default_rng(4).permutation(M * J + 3)[: M * J].reshape(M, J)
        cache_LPKRC = np.full((L, M * J + 3, K, rows, 2 * H), 99 if int8 else np.nan)
        scale_LPK2R = np.full((L, M * J + 3, K, 2, rows), np.nan, np.float32)
        for m, start in enumerate(starts):
            for j in range(J):
                if j * rows < start and (window is None or (j + 1) * rows > start - window + 1):
                    cache_LPKRC[LAYER, page_MJ[m, j]] = stored[m, :, j * rows : (j + 1) * rows]
                    if scale_MK2S is not None:
                        scale_LPK2R[LAYER, page_MJ[m, j]] = scale_MK2S[m, ..., j * rows : (j + 1) * rows]
                else:
                    page_MJ[m, j] = page_MJ[m, j] if j * rows < start else -1
        self.cache_LPKRC = array(cache_LPKRC, jnp.int8 if int8 else dtype)
        self.scale_LPK2R = array(scale_LPK2R) if int8 else None
        self.page_MJ = array(page_MJ, jnp.int32)

    def attend(self, backend, mesh, **options):
        if self.window is not None:
            options = {"window": jnp.int32(self.window)} | options
        return ATTEND(
            *(self.q_TNH, self.k_TKH, self.v_TKH, self.cache_LPKRC, LAYER),
            array(self.starts, jnp.int32), self.page_MJ,
            scale_LPK2R=self.scale_LPK2R, mesh=mesh, backend=backend, **options,
        )  # fmt: skip

    def expected(self, soft_cap=None, sink_N=None):
        q_TNH, k_TKH, v_TKH = (np.asarray(x).astype(np.float64) for x in (self.q_TNH, self.k_TKH, self.v_TKH))
        outs = []
        for m, start in enumerate(self.starts):
            own = slice(m * self.tokens, (m + 1) * self.tokens)
            k_SKH, v_SKH = np.split(self.rows_MKSC[m, :, :start].swapaxes(0, 1), 2, axis=-1)
            k_SKH, v_SKH = np.concatenate([k_SKH, k_TKH[own]]), np.concatenate([v_SKH, v_TKH[own]])
            outs.append(oracle.chunk_attention(q_TNH[own], k_SKH, v_SKH, self.window, soft_cap, sink_N))
        return np.concatenate(outs)

    def check(self, backend, mesh, soft_cap=None):
        out_TNH = self.attend(backend, mesh, soft_cap=soft_cap)
        assert out_TNH.dtype == self.dtype
        oracle.assert_close(out_TNH, self.expected(soft_cap))


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "native_cpu"])
@pytest.mark.parametrize(
    ("starts", "tokens"),
    [
        pytest.param(starts, tokens, marks=() if tokens in chosen else pytest.mark.product)
        for starts, chosen in [
            *(([0], {16, 256}), ([R], {200, 256}), ([3 * R], {16, 200})),
            *(([0, 3 * R, R], {64, 200}), ([R, 0, 0], {64, 256}), ([0, 0], {16, 200})),
        ]
        for tokens in (16, 64, 200, 256)
    ],
)
def test_chunks_behind_cached_rows(mesh, backend, starts, tokens):
    """A text that reads its neighbour's pages or tokens, a page too many or too few, blocks that are not full."""
    Case(starts, tokens, 1, 2, 16).check(backend, mesh)


@pytest.mark.parametrize(
    ("starts", "tokens"),
    [
        ([2 * R, 0], 144),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(([0], 16), ([3 * R], 20), ([0, 3 * R, R], 64), ([R, 0, 0], 256), ([0, 0], 200)),
                *(([R], 384), ([2 * R, 0], 512)),
            ]
        ),
    ],
)
def test_the_kernel_behind_cached_rows(mesh, starts, tokens):
    Case(starts, tokens, 1, 2, 64).check("pallas_interpret", mesh)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("K", "G", "H", "dtype"),
    [
        (3, 3, 64, jnp.float32),
        (1, 4, 128, jnp.bfloat16),
        (4, 1, 128, jnp.float32),
        (2, 2, 64, jnp.bfloat16),
        (1, 1, 256, jnp.float32),
    ],
)
def test_heads(mesh, backend, K, G, H, dtype):
    Case([R, 0], 144, K, G, H, dtype).check(backend, mesh)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [256, 512])
def test_pages_larger_than_blocks(mesh, backend, rows):
    Case([rows, 0, 2 * rows], 144, 1, 2, 64, rows=rows).check(backend, mesh)


@pytest.mark.parametrize("backend", ["xla", "native_cpu"])
@pytest.mark.parametrize(("rows", "int8"), [(64, False), (64, True), (48, False)])
def test_pages_smaller_than_blocks(mesh, backend, rows, int8):
    Case([3 * rows, 0, rows], 144, 1, 2, 64, window=100, rows=rows, int8=int8).check(backend, mesh)


WINDOWS = [1, 2, 16, 127, 128, 129, 130, 200, 256, 300, 385, 2**31 - 1]


@pytest.mark.parametrize(
    ("backend", "starts", "tokens", "windows"),
    [
        ("xla", [3 * R, 0], 200, WINDOWS),
        ("xla", [R], 16, WINDOWS),
        ("xla", [0], 300, WINDOWS),
        ("xla_gpu", [3 * R, 0], 300, WINDOWS),
        ("native_cpu", [3 * R, 0], 200, WINDOWS),
        ("native_cpu", [R], 16, WINDOWS),
        ("pallas_interpret", [3 * R, 0], 144, [130]),
        pytest.param("pallas_interpret", [3 * R, 0], 300, WINDOWS, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", [R], 512, WINDOWS, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", [R], 16, WINDOWS, marks=pytest.mark.slow),
    ],
)
def test_every_window_around_a_page_and_a_block(mesh, backend, starts, tokens, windows):
    """One row too many or too few at a window's far side; of pages before all windows nothing is read."""
    for window in windows:  # one compilation: the window is traced
        Case(starts, tokens, 1, 2, 64, window=window).check(backend, mesh)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 100, 2000])
def test_a_window_may_be_a_plain_number(mesh, backend, window):
    case = Case([2 * R, 0], 144, 1, 2, 64, window=window)
    attend = jax.jit(functools.partial(case.attend, backend, mesh, window=window))
    oracle.assert_close(attend(), case.expected())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 150])
def test_soft_cap(mesh, backend, window):
    """Gemma 2 caps at 50, which scores of 300 notice, in the cache and in the chunk."""
    case = Case([2 * R, 0], 144, 1, 2, 64, window=window, spread=50)
    expected_TNH = case.expected(soft_cap=50.0)
    out_TNH = case.attend(backend, mesh, soft_cap=50.0)
    np.testing.assert_allclose(out_TNH, expected_TNH, rtol=1e-3, atol=1e-4)
    changed_T = np.abs(expected_TNH - case.expected()).max(axis=(1, 2))
    assert (changed_T.reshape(2, -1).max(axis=1) > 0.1).all()


@pytest.mark.parametrize(
    ("backend", "K", "G", "H", "dtype", "window", "soft_cap"),
    [
        ("xla", 3, 3, 64, jnp.float32, None, None),
        ("xla", 1, 4, 128, jnp.bfloat16, 150, 3.0),
        ("xla", 2, 1, 16, jnp.float32, 300, None),
        ("xla_gpu", 3, 3, 64, jnp.float32, None, None),
        ("native_cpu", 3, 3, 64, jnp.float32, 300, None),
        ("xla_gpu", 1, 4, 128, jnp.bfloat16, 150, 3.0),
        ("pallas_interpret", 1, 4, 128, jnp.bfloat16, 150, 3.0),
        pytest.param("pallas_interpret", 3, 3, 64, jnp.float32, None, None, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 2, 1, 128, jnp.float32, 300, None, marks=pytest.mark.slow),
    ],
)
def test_int8_rows_mean_code_times_scale(mesh, backend, K, G, H, dtype, window, soft_cap):
    """k's and v's own scale, each at its row; the chunk's own rows have none."""
    Case([3 * R, 0, R], 64, K, G, H, dtype, window=window, int8=True).check(backend, mesh, soft_cap)


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "native_cpu", "pallas_interpret"])
def test_by_hand(mesh, backend):
    """A cached row of score log 3 and v = 8 among 127 of weight exp(-1000), an own one of score 0 and v = 4."""
    H = 64
    q_TNH, k_TKH, v_TKH = (np.full((1, 1, H), value, np.float32) for value in (0, 0, 4))
    q_TNH[..., 0] = 8  # times H**-0.5 is 1
    cache_LPKRC = np.zeros((1, 2, 1, R, 2 * H), np.float32)
    cache_LPKRC[0, 0], cache_LPKRC[0, 1, 0, :, 0] = np.nan, -1000
    cache_LPKRC[0, 1, 0, 5, 0], cache_LPKRC[0, 1, 0, 5, H:] = np.log(3), 8
    args = q_TNH, k_TKH, v_TKH, cache_LPKRC, 0, np.array([R], np.int32), np.array([[1]], np.int32)
    out_TNH = ATTEND(*args, mesh=mesh, backend=backend)
    np.testing.assert_allclose(out_TNH, np.full((1, 1, H), 7.0), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_no_real_row(mesh, backend):
    """Causality alone keeps the padding of each text out: it may hold anything finite."""
    case = Case([R, 0], 144, 1, 2, 64)
    expected_TNH = case.expected()
    is_padding_T11 = (jnp.arange(2 * 144) % 144 >= 100)[:, None, None]
    case.q_TNH, case.k_TKH, case.v_TKH = (
        jnp.where(is_padding_T11, 1e4, x) for x in (case.q_TNH, case.k_TKH, case.v_TKH)
    )
    is_real_T = ~np.asarray(is_padding_T11)[:, 0, 0]
    out_TNH = np.asarray(case.attend(backend, mesh))[is_real_T]
    np.testing.assert_allclose(out_TNH, expected_TNH[is_real_T], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(mesh, backend):
    """exp of a score that is not taken relative to the largest so far is inf."""
    case = Case([2 * R], 144, 1, 2, 64, spread=300)
    np.testing.assert_allclose(case.attend(backend, mesh), case.expected(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_one_scan_have_windows_of_their_own(mesh, backend):
    cases = [Case([2 * R, R], 64, 1, 2, 64, window=window) for window in (1, 150, 1000)]
    cache_LPKRC = jnp.stack([case.cache_LPKRC[LAYER] for case in cases])
    one = cases[0]

    @jax.jit
    def attend_layers(window_L):
        def of_layer(_, layer):
            args = one.q_TNH, one.k_TKH, one.v_TKH, cache_LPKRC, layer, array(one.starts), one.page_MJ
            return None, chunk_attention(*args, window=window_L[layer], mesh=mesh, backend=backend)

        return jax.lax.scan(of_layer, None, jnp.arange(3))[1]

    out_LTNH = attend_layers(array([case.window for case in cases]))
    for layer, case in enumerate(cases):
        oracle.assert_close(out_LTNH[layer], case.expected())


@pytest.mark.parametrize("int8", [False, True])
def test_sharded_equals_one_device(mesh, mesh_of_8, int8):
    case = Case([R, 0, 3 * R], 64, 8, 2, 64, window=200, int8=int8)
    one, eight = case.attend("xla", mesh), case.attend("xla", mesh_of_8)
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "block", "heads"),
    [
        (512, 1, 4, 256, 1),
        (512, 4, 1, 256, 4),
        (512, 8, 4, 256, 1),
        (384, 8, 4, 128, 2),
        (200, 2, 4, 256, 1),
        (129, 2, 2, 256, 2),
        (128, 2, 4, 128, 2),
        (512, 8, 8, 128, 1),
        (512, 1, 16, 128, 1),
        (512, 1, 71, 16, 1),
        (64, 8, 4, 64, 4),
        (48, 1, 64, 16, 1),
        (20, 3, 1, 32, 3),
        (1, 1, 1, 16, 1),
    ],
)
def test_queries_of_a_step_fit_into_vmem(tokens, kv_heads, group, block, heads):
    assert block_and_heads(tokens, kv_heads, group) == (block, heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (32, 2, 32)}, "k_TKH must be"),
        ({"v": (32, 1, 64)}, "v_TKH must be"),
        ({"q": (32, 3, 64)}, "divisible"),
        ({"start": (3,)}, r"M a divisor of the T=32 rows, got \(3,\)"),
        ({"start": ()}, r"start_M must be \[M\]"),
        ({"page": (1, 4)}, r"page_MJ must be \[M, J\] = \(2, pages of a text\), got \(1, 4\)"),
        ({"cache": (1, 4, 2, 100, 128)}, "rows=100 must have a multiple of 16; nearest above: 112"),
        ({"backend": "xla_gpu", "cache": (1, 4, 2, 96, 128)}, "rows=96 must have a multiple of 128; nearest above"),
        ({"cache": (1, 4, 2, 128, 64)}, r"C=64 lanes, but k and v side by side need 2 \* H=64"),
        ({"layer": 1}, r"layer=1 must be in \[0, L=1\)"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be above 0"),
        ({"scale": (1, 4, 2, 128, 2)}, r"scale_LPK2R must be \[L, P, K, 2, R\]"),
        ({"scale": (1, 4, 2, 2, 128)}, "int8 codes and float32 scales"),
        ({"backend": "tpu"}, "backend='tpu' must be one of"),
        (
            {"backend": "pallas", "q": (32, 4, 96), "k": (32, 2, 96), "v": (32, 2, 96), "cache": (1, 4, 2, 128, 192)},
            "H=96 makes rows of C=192 lanes",
        ),
    ],
)
def test_refuses(mesh, change, message):
    shapes = {"q": (32, 4, 64), "k": (32, 2, 64), "v": (32, 2, 64), "cache": (1, 4, 2, 128, 128)}
    q_TNH, k_TKH, v_TKH, cache_LPKRC = (jnp.zeros(change.get(name, shape)) for name, shape in shapes.items())
    start_M, page_MJ = (jnp.zeros(change.get(name, at), jnp.int32) for name, at in (("start", (2,)), ("page", (2, 4))))
    options = {name: change[name] for name in ("window", "soft_cap") if name in change}
    if "scale" in change:
        options["scale_LPK2R"] = jnp.zeros(change["scale"])
    with pytest.raises(ValueError, match=message):
        chunk_attention(
            q_TNH, k_TKH, v_TKH, cache_LPKRC, change.get("layer", 0), start_M, page_MJ,
            mesh=mesh, backend=change.get("backend", "xla"), **options,
        )  # fmt: skip
