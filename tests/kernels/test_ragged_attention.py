import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import attention_steps, ragged_attention
from slipstream.kernels.backend import interpret_params
from slipstream.kernels.ragged_attention import xla_gpu
from slipstream.kernels.ragged_attention.page_sizes import TARGET_BYTES, page_rows, path_of, shape_key, tuned_rows
from slipstream.kernels.ragged_attention.pallas_tpu import ragged_attention_tpu
from slipstream.kernels.ragged_attention.steps import live_steps

from tests.arrays import array

from . import oracle

L, LAYER, R = 3, 1, 128
PRODUCT = (pytest.mark.slow, pytest.mark.product)
ATTEND = jax.jit(ragged_attention, static_argnames=("soft_cap", "mesh", "backend"))


def attend(q_BWNH, new_BWKC, cache_LBKSC, layer, length_B, *, rows=R, scale_LBK2S=None, **options):
    """The op over a cache that is first scattered over a pool of pages; in every page of no slot there is NaN."""
    page_BJ, pool = oracle.table(length_B, cache_LBKSC.shape[3], rows)
    cache_LPKRC = oracle.paged(cache_LBKSC, page_BJ, pool, rows)
    if scale_LBK2S is not None:
        options["scale_LPK2R"] = oracle.paged(scale_LBK2S, page_BJ, pool, rows, row_axis=4)
    return ATTEND(q_BWNH, new_BWKC, cache_LPKRC, layer, length_B, array(page_BJ), **options)


@pytest.fixture(autouse=True)
def blocks_of_a_page(monkeypatch):
    """So that small caches have borders of blocks on GPUs too."""
    monkeypatch.setattr(xla_gpu, "BLOCK_BYTES", 1)


def inputs(lengths, S, K, G, H, dtype, seed=0, window=None, W=1):
    """q, new, cache, lengths; NaN in every row that must not be used, and in the other layers."""
    B = len(lengths)
    q_BWNH = oracle.normal(seed, B, W, K * G, H, dtype=dtype)
    new_BWKC = oracle.normal(seed + 1, B, W, K, 2 * H, dtype=dtype)
    before_BS = np.array(lengths)[:, None] - np.arange(S)[None, :]  # how far a row lies back from the new token
    used_BS = (before_BS > 0) & (before_BS < (window or S + 1))
    layer_BKSC = np.where(used_BS[:, None, :, None], oracle.normal(seed + 2, B, K, S, 2 * H, dtype=dtype), np.nan)
    cache_LBKSC = np.full((L, *layer_BKSC.shape), np.nan)
    cache_LBKSC[LAYER] = layer_BKSC
    return q_BWNH, new_BWKC, array(cache_LBKSC, dtype), array(lengths, jnp.int32)


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
@pytest.mark.parametrize(
    ("K", "G", "H", "dtype"),
    [
        pytest.param(1, 8, 128, jnp.bfloat16, marks=pytest.mark.slow),
        (3, 3, 64, jnp.float32),
        pytest.param(1, 4, 64, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(4, 1, 128, jnp.float32, marks=pytest.mark.slow),
        pytest.param(2, 8, 64, jnp.float32, marks=pytest.mark.slow),
        pytest.param(4, 3, 128, jnp.bfloat16, marks=pytest.mark.slow),
        *(  # each number of heads, of lanes and type is among those above
            pytest.param(*case, marks=PRODUCT) for case in [(2, 1, 64, jnp.bfloat16), (1, 4, 128, jnp.float32)]
        ),
    ],
)
def test_every_length_around_a_page(mesh, backend, K, G, H, dtype):
    """One row too many or too few, or a NaN that a mask lets through."""
    S = 3 * R
    args = inputs([0, 1, R - 1, 0, R, R + 1, S, 2 * R, 0], S, K, G, H, dtype)
    q_BWNH, new_BWKC, cache_LBKSC, length_B = args
    out_BWNH = attend(q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B, mesh=mesh, backend=backend)
    assert out_BWNH.dtype == dtype
    oracle.assert_close(out_BWNH, oracle.ragged_attention(q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B))
    v_BWNH = np.repeat(new_BWKC[..., H:], G, axis=2)
    for dead in (0, 3, 8):
        assert np.array_equal(out_BWNH[dead], v_BWNH[dead]), "an empty slot's answer is v_new, exactly"


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", pytest.param("pallas_interpret", marks=pytest.mark.slow)])
def test_large_pages(mesh, backend):
    """The pages that real cache lengths get, of more than one lane tile of rows."""
    K, G, H, S, rows = 1, 3, 128, 1024, 512
    args = inputs([rows - 1, rows + 1, 200, S], S, K, G, H, jnp.bfloat16)
    out_BWNH = attend(*args[:3], LAYER, args[3], rows=rows, mesh=mesh, backend=backend)
    oracle.assert_close(out_BWNH, oracle.ragged_attention(*args[:3], LAYER, args[3]))


def test_the_last_gpu_block_reaches_back(mesh, monkeypatch):
    """Blocks of 256 over 640 rows: the third starts within the second, and rows of both must count once."""
    monkeypatch.setattr(xla_gpu, "BLOCK_BYTES", 2**40)
    monkeypatch.setattr(xla_gpu, "BLOCK_ROWS", 256)
    attend = jax.jit(functools.partial(ragged_attention, mesh=mesh, backend="xla_gpu"))  # traced with these blocks
    for window in (None, 100, 300):
        args = inputs([0, 255, 511, 513, 640], 640, 2, 2, 64, jnp.float32, window=window)
        page_BJ, pool = oracle.table(args[3], 640, R)
        cache_LPKRC = oracle.paged(args[2], page_BJ, pool, R)
        of_window = {"window": None if window is None else jnp.int32(window)}
        out_BWNH = attend(*args[:2], cache_LPKRC, LAYER, args[3], array(page_BJ), **of_window)
        oracle.assert_close(out_BWNH, oracle.ragged_attention(*args[:3], LAYER, args[3], window=window))


def by_hand(k, v, H, dtype="float32"):
    """[2 H]: a key of zeros but for its first lane, and a value of v alone. Numpy's: jnp would compile each line."""
    return np.concatenate([[k], np.zeros(H - 1), np.full(H, v)]).astype(dtype)


def cached_by_hand(k, v, H, S, slack=np.nan, dtype="float32"):
    """[1, 1, 1, S, 2 H]: such a row, and slack behind it."""
    return np.concatenate([[by_hand(k, v, H, dtype)], np.full((S - 1, 2 * H), slack, dtype)])[None, None, None]


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret", "native_cpu"])
def test_by_hand(mesh, backend):
    """Scores 0 for the cached row and log 3 for the new one: weights 1/4 and 3/4."""
    H, S = 64, 128
    q_BWNH = by_hand(8.0, 0.0, H)[None, None, None, :H]  # times H**-0.5 is 1
    new_BWKC = by_hand(np.log(3.0), 4.0, H)[None, None, None]
    cache_LBKSC = cached_by_hand(0.0, 8.0, H, S)
    out_BWNH = attend(q_BWNH, new_BWKC, cache_LBKSC, 0, np.array([1], np.int32), mesh=mesh, backend=backend)
    np.testing.assert_allclose(out_BWNH, np.full((1, 1, 1, H), 5.0), rtol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret", "native_cpu"])
def test_all_slots_dead(mesh, backend):
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([0, 0, 0], 128, 1, 3, 64, jnp.float32)
    out_BWNH = attend(q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B, mesh=mesh, backend=backend)
    assert np.array_equal(out_BWNH, np.repeat(new_BWKC[..., 64:], 3, axis=2))


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "native_cpu"])
def test_large_scores_do_not_overflow(mesh, backend):
    """exp of a score that is not taken relative to the largest so far is inf."""
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([100, 300], 384, 1, 2, 64, jnp.float32)
    out_BWNH = attend(q_BWNH * 300, new_BWKC, cache_LBKSC, LAYER, length_B, mesh=mesh, backend=backend)
    expected_BWNH = oracle.ragged_attention(q_BWNH * 300, new_BWKC, cache_LBKSC, LAYER, length_B)
    np.testing.assert_allclose(out_BWNH, expected_BWNH, rtol=1e-3, atol=1e-3)


WINDOWS = [1, 2, 127, 128, 129, 300, 385, 2**31 - 1]


@pytest.mark.parametrize(
    ("backend", "K", "G", "H", "dtype", "windows"),
    [
        ("xla", 2, 2, 64, jnp.float32, WINDOWS),
        ("xla_gpu", 2, 2, 64, jnp.float32, WINDOWS),
        ("pallas_interpret", 1, 4, 64, jnp.bfloat16, [1, 128]),
        pytest.param("pallas_interpret", 2, 2, 128, jnp.float32, WINDOWS, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 3, 1, 64, jnp.float32, WINDOWS[1:5], marks=PRODUCT),  # 3 heads: see above
    ],
)
def test_every_length_and_window_around_a_page(mesh, backend, K, G, H, dtype, windows):
    """One row too many or too few on the window's other side, where there is NaN, too."""
    S = 3 * R
    lengths = [0, 1, R - 1, 0, R, R + 1, S, 2 * R, 0]
    for window in windows:  # one compilation: the window is traced
        q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs(lengths, S, K, G, H, dtype, window=window)
        args = (q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B)
        out_BWNH = attend(*args, window=jnp.int32(window), mesh=mesh, backend=backend)
        oracle.assert_close(out_BWNH, oracle.ragged_attention(*args, window=window))
        if window > S:
            everything = attend(*args, mesh=mesh, backend=backend)
            np.testing.assert_allclose(out_BWNH, everything, rtol=1e-6, atol=1e-6)
        v_BWNH = np.repeat(new_BWKC[..., H:], G, axis=2)
        for alone in range(len(lengths)) if window == 1 else (0, 3, 8):
            assert np.array_equal(out_BWNH[alone], v_BWNH[alone]), "a token that sees only itself gives v_new, exactly"


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", pytest.param("pallas_interpret", marks=pytest.mark.slow)])
def test_layers_of_one_scan_have_windows_of_their_own(mesh, backend):
    """Steps are listed once a window and picked by layer; each layer's slack is NaN."""
    S, windows, lengths = 256, [1, 100, 257], [0, 3, 200, 256]
    of_layers = [inputs(lengths, S, 1, 2, 64, jnp.float32, window=window) for window in windows]
    q_BWNH, new_BWKC, _, length_B = of_layers[0]
    cache_LBKSC = jnp.stack([cache_LBKSC[LAYER] for _, _, cache_LBKSC, _ in of_layers])
    page_BJ, pool = oracle.table(lengths, S, R)
    cache_LPKRC = oracle.paged(cache_LBKSC, page_BJ, pool, R)

    @jax.jit
    def attend_layers(window_L, page_BJ):
        def list_steps(window):
            return attention_steps(cache_LPKRC, length_B, page_BJ, window=window, mesh=mesh, backend=backend)

        listed = jax.tree.map(lambda *steps: jnp.stack(steps), *(list_steps(window) for window in windows))

        def of_layer(_, layer):
            steps = jax.tree.map(lambda steps_L: steps_L[layer], listed)
            args = (q_BWNH, new_BWKC, cache_LPKRC, layer, length_B, page_BJ, steps)
            return None, ragged_attention(*args, window=window_L[layer], mesh=mesh, backend=backend)

        return jax.lax.scan(of_layer, None, jnp.arange(3))[1]

    out_LBWNH = attend_layers(array(windows), array(page_BJ))
    for layer, window in enumerate(windows):
        expected_BWNH = oracle.ragged_attention(q_BWNH, new_BWKC, cache_LBKSC, layer, length_B, window=window)
        oracle.assert_close(out_LBWNH[layer], expected_BWNH)


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "native_cpu", "pallas_interpret"])
@pytest.mark.parametrize(
    ("W", "K", "G", "H", "dtype"),
    [
        (4, 1, 4, 128, jnp.bfloat16),
        pytest.param(3, 3, 3, 64, jnp.float32, marks=pytest.mark.slow),
        pytest.param(8, 2, 1, 128, jnp.float32, marks=pytest.mark.slow),
        pytest.param(2, 1, 8, 256, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(5, 4, 2, 64, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(7, 1, 3, 64, jnp.float32, marks=PRODUCT),  # 3 and 5 are odd, too
    ],
)
def test_several_tokens(mesh, backend, W, K, G, H, dtype):
    """Each sees the cached rows and, of the step's own, those up to itself: one that saw the next would differ."""
    args = inputs([0, 1, R - 1, 0, R, R + 1, 3 * R - W, 2 * R - 2, 0], 3 * R, K, G, H, dtype, W=W)
    out_BWNH = attend(*args[:3], LAYER, args[3], mesh=mesh, backend=backend)
    oracle.assert_close(out_BWNH, oracle.ragged_attention(*args[:3], LAYER, args[3]))
    v_BWNH = np.repeat(args[1][..., H:], G, axis=2)
    for dead in (0, 3, 8):
        assert np.array_equal(out_BWNH[dead, 0], v_BWNH[dead, 0]), "a first token that sees itself alone gives its v"


@pytest.mark.parametrize(
    ("backend", "W", "K", "G", "H", "dtype", "windows"),
    [
        *(
            (backend, 4, 2, 2, 64, jnp.float32, [1, 2, 3, 4, *WINDOWS[2:]])
            for backend in ("xla", "xla_gpu", "native_cpu")
        ),
        pytest.param("pallas_interpret", 4, 1, 3, 64, jnp.bfloat16, [3, R + 2], marks=pytest.mark.slow),
        pytest.param(
            "pallas_interpret", 8, 2, 2, 128, jnp.float32, [1, 2, 7, 8, 9, *WINDOWS[3:]], marks=pytest.mark.slow
        ),
        pytest.param("pallas_interpret", 8, 2, 2, 128, jnp.float32, [*range(3, 7), WINDOWS[2]], marks=PRODUCT),
    ],
)
def test_several_tokens_with_windows(mesh, backend, W, K, G, H, dtype, windows):
    """Each token's window begins a row later than that of the one before it, within the cache or the step's own."""
    lengths = [0, 1, R - 1, R, R + 2, 3 * R - W, 2 * R]
    for window in windows:
        args = inputs(lengths, 3 * R, K, G, H, dtype, window=window, W=W)
        out_BWNH = attend(*args[:3], LAYER, args[3], window=jnp.int32(window), mesh=mesh, backend=backend)
        oracle.assert_close(out_BWNH, oracle.ragged_attention(*args[:3], LAYER, args[3], window=window))


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "native_cpu", "pallas_interpret"])
def test_several_tokens_over_int8_with_a_cap(mesh, backend):
    """What the step's own rows do not have, scales, is nowhere applied to them; their scores are capped, too."""
    W, H, window = 3, 64, 130
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([0, 2, 129, 256, 140], 256, 2, 2, H, jnp.float32, 0, window, W)
    codes, scales, meant = quantised(np.asarray(cache_LBKSC))
    out_BWNH = attend(
        *(q_BWNH, new_BWKC, codes, LAYER, length_B),
        scale_LBK2S=scales, window=window, soft_cap=3.0, mesh=mesh, backend=backend,
    )  # fmt: skip
    oracle.assert_close(out_BWNH, oracle.ragged_attention(q_BWNH, new_BWKC, meant, LAYER, length_B, window, 3.0))


@pytest.mark.parametrize(
    ("backend", "window"),
    [
        ("xla", None),
        ("xla", 70),
        ("xla_gpu", 70),
        ("pallas_interpret", 70),
        pytest.param("pallas_interpret", None, marks=pytest.mark.slow),
    ],
)
def test_soft_cap(mesh, backend, window):
    """Gemma 2 caps at 50, which scores of 300 notice; the new token's own score is capped, too."""
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([0, 1, 100, 256], 256, 1, 2, 64, jnp.float32, window=window)
    args = (q_BWNH * 100, new_BWKC, cache_LBKSC, LAYER, length_B)
    out_BWNH = attend(*args, window=window, soft_cap=50.0, mesh=mesh, backend=backend)
    expected_BWNH = oracle.ragged_attention(*args, window=window, soft_cap=50.0)
    np.testing.assert_allclose(out_BWNH, expected_BWNH, rtol=1e-3, atol=1e-4)
    uncapped_BWNH = oracle.ragged_attention(*args, window=window)
    assert np.abs(expected_BWNH - uncapped_BWNH)[2:].max() > 0.1


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
def test_soft_cap_by_hand(mesh, backend):
    """Scores 0 and 1000, capped at log 3: weights 1/4 and 3/4."""
    H, S = 64, 128
    q_BWNH = by_hand(8.0, 0.0, H)[None, None, None, :H]
    new_BWKC = by_hand(1000.0, 4.0, H)[None, None, None]
    cache_LBKSC = cached_by_hand(0.0, 8.0, H, S)
    args = (q_BWNH, new_BWKC, cache_LBKSC, 0, np.array([1], np.int32))
    out_BWNH = attend(*args, soft_cap=float(np.log(3.0)), mesh=mesh, backend=backend)
    np.testing.assert_allclose(out_BWNH, np.full((1, 1, 1, H), 5.0), rtol=1e-6)


def quantised(rows_LBKSC):
    """(codes, scales, what they stand for); where a row is NaN its scales are NaN and its codes are 99."""
    half_LBKS2H = np.asarray(rows_LBKSC, np.float64).reshape(*rows_LBKSC.shape[:-1], 2, -1)
    scale_LBKS2 = (np.abs(half_LBKS2H).max(axis=-1) / 127).astype(np.float32)
    code_LBKS2H = np.nan_to_num(half_LBKS2H / scale_LBKS2[..., None], nan=99).round().astype(np.int8)
    meant = (code_LBKS2H * scale_LBKS2[..., None].astype(np.float64)).reshape(rows_LBKSC.shape)
    codes = array(code_LBKS2H.reshape(rows_LBKSC.shape))
    return codes, array(scale_LBKS2.swapaxes(-1, -2)), meant


@pytest.mark.parametrize(
    ("backend", "K", "G", "H", "dtype", "window", "soft_cap"),
    [
        ("xla", 3, 3, 64, jnp.float32, None, None),
        ("xla", 1, 8, 128, jnp.bfloat16, 130, 3.0),
        ("xla_gpu", 3, 3, 64, jnp.float32, None, None),
        ("xla_gpu", 1, 8, 128, jnp.bfloat16, 130, 3.0),
        ("pallas_interpret", 1, 8, 128, jnp.bfloat16, None, None),
        pytest.param("pallas_interpret", 3, 3, 64, jnp.float32, None, None, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 4, 2, 128, jnp.float32, 130, None, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 2, 2, 64, jnp.bfloat16, None, 3.0, marks=pytest.mark.slow),
    ],
)
def test_int8_rows_mean_code_times_scale(mesh, backend, K, G, H, dtype, window, soft_cap):
    """k's and v's own scale, each at its row; unused rows have NaN for a scale; the new token is not quantised."""
    S = 384
    lengths = [0, 1, 127, 0, 128, 129, S, 256, 0]
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs(lengths, S, K, G, H, dtype, window=window)
    spread_1S1 = np.exp2(np.random.default_rng(7).integers(-8, 3, (1, S, 1)))  # scales that differ from row to row
    codes, scales, meant = quantised(
        np.asarray(cache_LBKSC, np.float32) * np.where(np.arange(2 * H) < H, 1, spread_1S1)
    )
    out_BWNH = attend(
        *(q_BWNH, new_BWKC, codes, LAYER, length_B),
        scale_LBK2S=scales, window=window, soft_cap=soft_cap, mesh=mesh, backend=backend,
    )  # fmt: skip
    assert out_BWNH.dtype == dtype
    expected_BWNH = oracle.ragged_attention(q_BWNH, new_BWKC, meant, LAYER, length_B, window, soft_cap)
    oracle.assert_close(out_BWNH, expected_BWNH)
    v_BWNH = np.repeat(new_BWKC[..., H:], G, axis=2)
    for dead in (0, 3, 8):
        assert np.array_equal(out_BWNH[dead], v_BWNH[dead]), "an empty slot's answer is v_new, exactly"


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
def test_int8_by_hand(mesh, backend):
    """k = 4 x 0.25 gives the score log 3, as the new token has it; v = 8 x 0.5 and 8: the mean of 4 and 8."""
    H, S = 64, 128
    q_BWNH = by_hand(8.0 * np.log(3.0), 0.0, H)[None, None, None, :H]
    new_BWKC = by_hand(1.0, 8.0, H)[None, None, None]
    codes = cached_by_hand(4, 8, H, S, slack=77, dtype="int8")
    scales = np.full((1, 1, 1, 2, S), np.nan, np.float32)
    scales[..., 0] = 0.25, 0.5
    out_BWNH = attend(
        q_BWNH, new_BWKC, codes, 0, np.array([1], np.int32), scale_LBK2S=scales, mesh=mesh, backend=backend
    )  # fmt: skip
    np.testing.assert_allclose(out_BWNH, np.full((1, 1, 1, H), 6.0), rtol=1e-6)


LIST = jax.jit(functools.partial(live_steps, rows=R, interpret=True), static_argnames=("max_pages", "cores"))


@pytest.mark.parametrize(
    ("cores", "window"), [(1, None), (2, None), (4, None), (1, 1), (1, 2), (2, 128), (1, 200), (4, 129), (2, 400)]
)
@pytest.mark.parametrize(
    "lengths",  # of eight slots each, so that a program serves all of them
    [[0, 1, 127, 0, 0, 128, 129, 384], [0, 0, 300, *[0] * 5], [384, 0] * 4, [1] * 8, [5, *[0] * 7], [0] * 8],
)
def test_the_steps_are_the_live_pages(lengths, cores, window):
    """The pipeline fetches a page when its index differs from the last step's: those must be the live ones, once each.

    A dead slot's step that moved the index would read HBM for nothing; a dead slot without a step has no answer.
    """
    page_BJ, pool = oracle.table(lengths, 3 * R, R)
    steps = LIST(
        array(lengths, jnp.int32), None if window is None else jnp.int32(window), array(page_BJ),
        max_pages=pool, cores=cores,
    )  # fmt: skip
    steps = jax.tree.map(np.asarray, steps)
    N = steps.slot.size // cores
    longest = int(steps.count.max())
    for core in range(cores):
        count = int(steps.count[core])
        listed = [
            (int(steps.slot[i]), int(steps.block[i]), int(steps.page[i])) for i in range(core * N, core * N + longest)
        ]
        slots = range(core, len(lengths), cores)
        rows = {b: [j for j in range(lengths[b]) if window is None or j > lengths[b] - window] for b in slots}
        live = [(b, j) for b in slots for j in sorted({row // R for row in rows[b]})]
        pages = [page for _, _, page in listed]
        fetched = [page for i, page in enumerate(pages) if i == 0 or page != pages[i - 1]]
        assert fetched == [page_BJ[b, j] for b, j in live] or (not live and fetched == [0])
        answered = [b for b in slots for _ in range(max(1, len({row // R for row in rows[b]})))]
        assert [slot for slot, *_ in listed[:count]] == answered
        assert [(slot, block) for slot, block, _ in listed[:count] if rows[slot]] == live
        assert [block for slot, block, _ in listed[:count] if not rows[slot]] == [0] * sum(not rows[b] for b in slots)
        assert set(listed[count:]) <= {listed[count - 1]}, "the longer core's steps beyond this one's move nothing"


def test_lists_are_as_long_as_the_pool_allows():
    """Not as slots times pages of the longest: 512 slots of 32,768 tokens must fit into 1 MiB."""
    page_BJ = jnp.zeros((512, 128), jnp.int32)
    listed = functools.partial(live_steps, jnp.zeros(512, jnp.int32), None, page_BJ, rows=256, cores=1)
    steps = jax.eval_shape(functools.partial(listed, max_pages=2816))
    assert steps.page.shape == (2816 + 512,)
    few = jax.eval_shape(functools.partial(listed, max_pages=10**6))
    assert few.page.shape == (512 * 128 + 512,)


@pytest.mark.slow
def test_two_cores():
    """On a chip with two cores the shorter list of steps is padded; a padded step must change nothing."""
    lengths, S, H = [200, 1, 0, 0, 256, 130], 256, 128
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs(lengths, S, 1, 2, H, jnp.float32)
    page_BJ, pool = oracle.table(lengths, S, R)
    steps = LIST(length_B, None, array(page_BJ), max_pages=pool, cores=2)
    assert steps.count.tolist() == [5, 4]
    cache_LPKRC = oracle.paged(cache_LBKSC, page_BJ, pool, R)
    attend = jax.jit(functools.partial(ragged_attention_tpu, interpret=interpret_params("pallas_interpret")))
    at = (None, jnp.int32(LAYER), length_B, array(page_BJ), None, None)
    out_BWNH = attend(q_BWNH, new_BWKC, cache_LPKRC, *at, steps)
    oracle.assert_close(out_BWNH, oracle.ragged_attention(q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B))


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret", "native_cpu"])
def test_slots_share_pages(mesh, backend):
    """Two slots with one first page, of which the second sees less; more references than the pool has pages."""
    lengths, S = [R + 9, R - 5, R + 3, R], 2 * R
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs(lengths, S, 1, 2, 64, jnp.float32)
    cache_LBKSC = np.array(cache_LBKSC)
    cache_LBKSC[:, :, :, :R] = np.nan_to_num(cache_LBKSC[:, :1, :, :R])
    page_BJ = np.array([[2, 0], [2, -1], [2, 1], [2, -1]], np.int32)
    cache_LPKRC = oracle.paged(cache_LBKSC, page_BJ, 4, R)
    args, where = (length_B, array(page_BJ)), {"mesh": mesh, "backend": backend}
    steps = jax.jit(functools.partial(attention_steps, max_pages=6, **where))(cache_LPKRC, *args)
    out_BWNH = ATTEND(q_BWNH, new_BWKC, cache_LPKRC, LAYER, *args, steps, **where)
    oracle.assert_close(out_BWNH, oracle.ragged_attention(q_BWNH, new_BWKC, cache_LBKSC, LAYER, length_B))


@pytest.mark.slow
def test_steps_listed_once_for_all_layers(mesh):
    """What the engine does: the steps come from outside the layer loop."""
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([0, 3, 200], 256, 1, 2, 64, jnp.float32)
    page_BJ, pool = oracle.table(length_B, 256, R)
    cache_LPKRC, page_BJ = oracle.paged(cache_LBKSC, page_BJ, pool, R), array(page_BJ)
    where = {"mesh": mesh, "backend": "pallas_interpret"}
    args = (q_BWNH, new_BWKC, cache_LPKRC, LAYER, length_B, page_BJ)
    steps = attention_steps(cache_LPKRC, length_B, page_BJ, **where)
    assert np.array_equal(ATTEND(*args, steps, **where), ATTEND(*args, **where))
    assert attention_steps(cache_LPKRC, length_B, page_BJ, mesh=mesh, backend="xla") is None


def test_sharded_equals_one_device(mesh, mesh_of_8):
    """Query heads and the kv heads they use must land on the same chip."""
    q_BWNH, new_BWKC, cache_LBKSC, length_B = inputs([0, 3, 200], 256, 8, 2, 64, jnp.float32)
    args = (q_BWNH, new_BWKC, cache_LBKSC, jnp.int32(LAYER), length_B)
    one = attend(*args, mesh=mesh, backend="xla")
    eight = attend(*args, mesh=mesh_of_8, backend="xla")
    np.testing.assert_allclose(eight, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("slots", "cache_length", "pages"),
    [(8, 4096, 8), (8, 768, 6), (32, 4096, 8), (128, 4096, 2), (2048, 4096, 1), (48, 4224, 5)],
)
def test_pages_of_a_gpu_block(monkeypatch, slots, cache_length, pages):
    """8 kv heads of 256 lanes in bf16, 4 KiB a row of a slot."""
    monkeypatch.undo()
    assert xla_gpu.pages_a_block(slots * R * 8 * 256 * 2, R, cache_length // R) == pages


TPUS = ["TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite"]


@pytest.mark.parametrize("device_kind", [*TPUS, "TPU v99", None])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_page_rows(K, H, dtype, device_kind):
    """Tuned or not, known device or not: pages are whole tiles, divide the slot, and two of them fit into VMEM."""
    for S in (128, 384, 512, 640, 1024, 8192):
        rows = page_rows(K, H, S, dtype, device_kind)
        page_bytes = rows * K * 2 * H * jnp.dtype(dtype).itemsize
        assert S % rows == 0
        assert rows % R == 0
        is_tuned = device_kind is not None and shape_key(K, H, jnp.dtype(dtype).name) in tuned_rows(device_kind)
        assert rows == R or page_bytes <= TARGET_BYTES or is_tuned
        assert 2 * page_bytes <= 4 * 1024 * 1024, "two of them must fit in VMEM beside the rest"
        assert device_kind or rows == R


def test_tuned_sizes_are_there():
    assert [path_of(kind).name for kind in TPUS] == [
        "tpu_v4.json",
        "tpu_v5.json",
        "tpu_v5_lite.json",
        "tpu_v6_lite.json",
    ]
    assert all(tuned_rows(kind) for kind in TPUS)
    assert tuned_rows("TPU v99") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BWNH": (2, 1, 5, 64)}, "num_q_heads=5 must be divisible by num_kv_heads=2"),
        ({"q_BWNH": (2, 1, 4, 128)}, "C=128 lanes"),
        ({"q_BWNH": (2, 4, 64)}, r"q_BWNH must be \[B, W, N, H\], got \(2, 4, 64\); one token per slot is W = 1"),
        ({"new_BWKC": (2, 1, 1, 128)}, r"new_BWKC must be \[B, W, K, C\] = \(2, 1, 2, 128\), got \(2, 1, 1, 128\)"),
        ({"q_BWNH": (2, 3, 4, 64)}, r"new_BWKC must be \[B, W, K, C\] = \(2, 3, 2, 128\), got \(2, 1, 2, 128\)"),
        ({"cache_LPKRC": (3, 5, 2, 130, 128)}, "rows=130 must have a multiple of 16; nearest above: 144"),
        ({"cache_LPKRC": (3, 5, 2, 130, 128), "backend": "pallas"}, "a multiple of 128; nearest above: 256"),
        ({"page_BJ": (3, 4)}, r"page_BJ must be \[B, J\] = \(2, pages of a text\), got \(3, 4\)"),
        ({"page_BJ": (2,)}, r"page_BJ must be \[B, J\]"),
        (
            {"q_BWNH": (2, 1, 4, 80), "new_BWKC": (2, 1, 2, 160), "cache_LPKRC": (3, 5, 2, 128, 160)}
            | {"backend": "pallas"},
            "pad heads to 128",
        ),
        ({"length_B": (3,)}, "length_B must be"),
        ({"layer": 3}, "layer=3"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"window": jnp.ones(2, jnp.int32)}, r"integer scalar, got int32\[2\]"),
        ({"window": 7.0}, r"integer scalar, got float32\[\]"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be above 0"),
        ({"scale": (3, 5, 2, 128, 2)}, r"scale_LPK2R must be \[L, P, K, 2, R\] = \(3, 5, 2, 2, 128\)"),
        ({"scale": (3, 5, 2, 2, 128)}, "has int8 codes and float32 scales"),
        ({"dtype": jnp.bfloat16}, "cast before the call"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"chips": 8}, "num_kv_heads=2 must be divisible by shards=8"),
    ],
)
def test_refuses(mesh, mesh_of_8, change, message):
    shapes = {
        "q_BWNH": (2, 1, 4, 64),
        "new_BWKC": (2, 1, 2, 128),
        "cache_LPKRC": (3, 5, 2, 128, 128),
        "length_B": (2,),
        "page_BJ": (2, 4),
    } | change
    args = {
        "q_BWNH": jnp.zeros(shapes["q_BWNH"], change.get("dtype", jnp.float32)),
        "new_BWKC": jnp.zeros(shapes["new_BWKC"]),
        "cache_LPKRC": jnp.zeros(shapes["cache_LPKRC"]),
        "page_BJ": jnp.zeros(shapes["page_BJ"], jnp.int32),
        "layer": change.get("layer", 0),
        "length_B": jnp.zeros(shapes["length_B"], jnp.int32),
        "window": change.get("window"),
        "soft_cap": change.get("soft_cap"),
        "scale_LPK2R": jnp.zeros(change["scale"]) if "scale" in change else None,
    }
    with pytest.raises(ValueError, match=message):
        ragged_attention(**args, mesh=mesh_of_8 if "chips" in change else mesh, backend=change.get("backend", "xla"))
