import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import attention_steps, ragged_attention
from slipstream.kernels.backend import interpret_params
from slipstream.kernels.ragged_attention import xla_gpu
from slipstream.kernels.ragged_attention.block_sizes import TARGET_BYTES, TUNED, block_size
from slipstream.kernels.ragged_attention.pallas_tpu import live_steps, ragged_attention_tpu

from . import oracle

L, LAYER = 3, 1
ATTEND = jax.jit(ragged_attention, static_argnames=("soft_cap", "mesh", "backend"))


@pytest.fixture(autouse=True)
def blocks_of_128(monkeypatch):
    """So that small caches have borders of blocks on GPUs too."""
    monkeypatch.setattr(xla_gpu, "BLOCK_BYTES", 1)


def inputs(lengths, S, K, G, H, dtype, seed=0, window=None):
    """q, new, cache, lengths; NaN in every row that must not be used, and in the other layers."""
    B = len(lengths)
    q_BNH = oracle.normal(seed, B, K * G, H, dtype=dtype)
    new_BKC = oracle.normal(seed + 1, B, K, 2 * H, dtype=dtype)
    before_BS = np.array(lengths)[:, None] - np.arange(S)[None, :]  # how far a row lies back from the new token
    used_BS = (before_BS > 0) & (before_BS < (window or S + 1))
    layer_BKSC = np.where(used_BS[:, None, :, None], oracle.normal(seed + 2, B, K, S, 2 * H, dtype=dtype), np.nan)
    cache_LBKSC = np.full((L, *layer_BKSC.shape), np.nan)
    cache_LBKSC[LAYER] = layer_BKSC
    return q_BNH, new_BKC, jnp.asarray(cache_LBKSC, dtype), jnp.asarray(lengths, jnp.int32)


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
@pytest.mark.parametrize(
    ("K", "G", "H", "dtype"),
    [
        (1, 8, 128, jnp.bfloat16),
        (3, 3, 64, jnp.float32),
        pytest.param(1, 4, 64, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(4, 1, 128, jnp.float32, marks=pytest.mark.slow),
        pytest.param(2, 8, 64, jnp.float32, marks=pytest.mark.slow),
        pytest.param(4, 3, 128, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(2, 1, 64, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(1, 4, 128, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_every_length_around_a_block(mesh, backend, K, G, H, dtype):
    """One row too many or too few, or a NaN that a mask lets through."""
    S = 384
    block = block_size(K, H, S, dtype)
    assert block == 128
    args = inputs([0, 1, block - 1, 0, block, block + 1, S, 2 * block, 0], S, K, G, H, dtype)
    q_BNH, new_BKC, cache_LBKSC, length_B = args
    out_BNH = ATTEND(q_BNH, new_BKC, cache_LBKSC, LAYER, length_B, mesh=mesh, backend=backend)
    assert out_BNH.dtype == dtype
    oracle.assert_close(out_BNH, oracle.ragged_attention(q_BNH, new_BKC, cache_LBKSC, LAYER, length_B))
    v_BNH = jnp.repeat(new_BKC[..., H:], G, axis=1)
    for dead in (0, 3, 8):
        assert np.array_equal(out_BNH[dead], v_BNH[dead]), "an empty slot's answer is v_new, exactly"


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", pytest.param("pallas_interpret", marks=pytest.mark.slow)])
def test_large_blocks(mesh, backend):
    """The blocks that real cache lengths get, of more than one lane tile of rows."""
    K, G, H, S = 1, 3, 128, 1024
    block = block_size(K, H, S, jnp.bfloat16)
    assert block == 512
    args = inputs([block - 1, block + 1, 200, S], S, K, G, H, jnp.bfloat16)
    out_BNH = ATTEND(*args[:3], LAYER, args[3], mesh=mesh, backend=backend)
    oracle.assert_close(out_BNH, oracle.ragged_attention(*args[:3], LAYER, args[3]))


@pytest.mark.parametrize("window", [None, 100, 300])
def test_the_last_gpu_block_reaches_back(mesh, monkeypatch, window):
    """Blocks of 256 over 640 rows: the third starts within the second, and rows of both must count once."""
    monkeypatch.setattr(xla_gpu, "BLOCK_BYTES", 2**40)
    monkeypatch.setattr(xla_gpu, "BLOCK_ROWS", 256)
    args = inputs([0, 255, 511, 513, 640], 640, 2, 2, 64, jnp.float32, window=window)
    attend = jax.jit(functools.partial(ragged_attention, mesh=mesh, backend="xla_gpu"))  # traced with these blocks
    out_BNH = attend(*args[:3], LAYER, args[3], window=None if window is None else jnp.int32(window))
    oracle.assert_close(out_BNH, oracle.ragged_attention(*args[:3], LAYER, args[3], window=window))


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
def test_by_hand(mesh, backend):
    """Scores 0 for the cached row and log 3 for the new one: weights 1/4 and 3/4."""
    H, S = 64, 128
    q_BNH = jnp.zeros((1, 1, H)).at[0, 0, 0].set(8.0)  # times H**-0.5 is 1
    new_BKC = jnp.zeros((1, 1, 2 * H)).at[0, 0, 0].set(np.log(3.0)).at[0, 0, H:].set(4.0)
    cache_LBKSC = jnp.full((1, 1, 1, S, 2 * H), jnp.nan).at[0, 0, 0, 0].set(0.0).at[0, 0, 0, 0, H:].set(8.0)
    out_BNH = ATTEND(q_BNH, new_BKC, cache_LBKSC, 0, jnp.array([1]), mesh=mesh, backend=backend)
    np.testing.assert_allclose(out_BNH, np.full((1, 1, H), 5.0), rtol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
def test_all_slots_dead(mesh, backend):
    q_BNH, new_BKC, cache_LBKSC, length_B = inputs([0, 0, 0], 128, 1, 3, 64, jnp.float32)
    out_BNH = ATTEND(q_BNH, new_BKC, cache_LBKSC, LAYER, length_B, mesh=mesh, backend=backend)
    assert np.array_equal(out_BNH, jnp.repeat(new_BKC[..., 64:], 3, axis=1))


@pytest.mark.parametrize("backend", ["xla", "xla_gpu"])
def test_large_scores_do_not_overflow(mesh, backend):
    """exp of a score that is not taken relative to the largest so far is inf."""
    q_BNH, new_BKC, cache_LBKSC, length_B = inputs([100, 300], 384, 1, 2, 64, jnp.float32)
    out_BNH = ATTEND(q_BNH * 300, new_BKC, cache_LBKSC, LAYER, length_B, mesh=mesh, backend=backend)
    expected_BNH = oracle.ragged_attention(q_BNH * 300, new_BKC, cache_LBKSC, LAYER, length_B)
    np.testing.assert_allclose(out_BNH, expected_BNH, rtol=1e-3, atol=1e-3)


WINDOWS = [1, 2, 127, 128, 129, 300, 385, 2**31 - 1]


@pytest.mark.parametrize(
    ("backend", "K", "G", "H", "dtype", "windows"),
    [
        ("xla", 2, 2, 64, jnp.float32, WINDOWS),
        ("xla_gpu", 2, 2, 64, jnp.float32, WINDOWS),
        ("pallas_interpret", 1, 4, 64, jnp.bfloat16, [1, 128]),
        pytest.param("pallas_interpret", 2, 2, 128, jnp.float32, WINDOWS, marks=pytest.mark.slow),
        pytest.param("pallas_interpret", 3, 1, 64, jnp.float32, WINDOWS[1:5], marks=pytest.mark.slow),
    ],
)
def test_every_length_and_window_around_a_block(mesh, backend, K, G, H, dtype, windows):
    """One row too many or too few on the window's other side, where there is NaN, too."""
    S, block = 384, 128
    assert block_size(K, H, S, dtype) == block
    lengths = [0, 1, block - 1, 0, block, block + 1, S, 2 * block, 0]
    for window in windows:  # one compilation: the window is traced
        q_BNH, new_BKC, cache_LBKSC, length_B = inputs(lengths, S, K, G, H, dtype, window=window)
        args = (q_BNH, new_BKC, cache_LBKSC, LAYER, length_B)
        out_BNH = ATTEND(*args, window=jnp.int32(window), mesh=mesh, backend=backend)
        oracle.assert_close(out_BNH, oracle.ragged_attention(*args, window=window))
        if window > S:
            everything = ATTEND(*args, mesh=mesh, backend=backend)
            np.testing.assert_allclose(out_BNH, everything, rtol=1e-6, atol=1e-6)
        v_BNH = jnp.repeat(new_BKC[..., H:], G, axis=1)
        for alone in range(len(lengths)) if window == 1 else (0, 3, 8):
            assert np.array_equal(out_BNH[alone], v_BNH[alone]), "a token that sees only itself gives v_new, exactly"


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", pytest.param("pallas_interpret", marks=pytest.mark.slow)])
def test_layers_of_one_scan_have_windows_of_their_own(mesh, backend):
    """Steps are listed once a window and picked by layer; each layer's slack is NaN."""
    S, windows, lengths = 256, [1, 100, 257], [0, 3, 200, 256]
    of_layers = [inputs(lengths, S, 1, 2, 64, jnp.float32, window=window) for window in windows]
    q_BNH, new_BKC, _, length_B = of_layers[0]
    cache_LBKSC = jnp.stack([cache_LBKSC[LAYER] for _, _, cache_LBKSC, _ in of_layers])

    @jax.jit
    def attend(window_L):
        def list_steps(window):
            return attention_steps(cache_LBKSC, length_B, window=window, mesh=mesh, backend=backend)

        listed = jax.tree.map(lambda *steps: jnp.stack(steps), *(list_steps(window) for window in windows))

        def of_layer(_, layer):
            steps = jax.tree.map(lambda steps_L: steps_L[layer], listed)
            out_BNH = ragged_attention(
                q_BNH, new_BKC, cache_LBKSC, layer, length_B, steps, window=window_L[layer], mesh=mesh, backend=backend
            )
            return None, out_BNH

        return jax.lax.scan(of_layer, None, jnp.arange(3))[1]

    out_LBNH = attend(jnp.array(windows))
    for layer, window in enumerate(windows):
        expected_BNH = oracle.ragged_attention(q_BNH, new_BKC, cache_LBKSC, layer, length_B, window=window)
        oracle.assert_close(out_LBNH[layer], expected_BNH)


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
    q_BNH, new_BKC, cache_LBKSC, length_B = inputs([0, 1, 100, 256], 256, 1, 2, 64, jnp.float32, window=window)
    args = (q_BNH * 100, new_BKC, cache_LBKSC, LAYER, length_B)
    out_BNH = ATTEND(*args, window=window, soft_cap=50.0, mesh=mesh, backend=backend)
    expected_BNH = oracle.ragged_attention(*args, window=window, soft_cap=50.0)
    np.testing.assert_allclose(out_BNH, expected_BNH, rtol=1e-3, atol=1e-4)
    uncapped_BNH = oracle.ragged_attention(*args, window=window)
    assert np.abs(expected_BNH - uncapped_BNH)[2:].max() > 0.1


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
def test_soft_cap_by_hand(mesh, backend):
    """Scores 0 and 1000, capped at log 3: weights 1/4 and 3/4."""
    H, S = 64, 128
    q_BNH = jnp.zeros((1, 1, H)).at[0, 0, 0].set(8.0)
    new_BKC = jnp.zeros((1, 1, 2 * H)).at[0, 0, 0].set(1000.0).at[0, 0, H:].set(4.0)
    cache_LBKSC = jnp.full((1, 1, 1, S, 2 * H), jnp.nan).at[0, 0, 0, 0].set(0.0).at[0, 0, 0, 0, H:].set(8.0)
    args = (q_BNH, new_BKC, cache_LBKSC, 0, jnp.array([1]))
    out_BNH = ATTEND(*args, soft_cap=float(np.log(3.0)), mesh=mesh, backend=backend)
    np.testing.assert_allclose(out_BNH, np.full((1, 1, H), 5.0), rtol=1e-6)


def quantised(rows_LBKSC):
    """(codes, scales, what they stand for); where a row is NaN its scales are NaN and its codes are 99."""
    half_LBKS2H = np.asarray(rows_LBKSC, np.float64).reshape(*rows_LBKSC.shape[:-1], 2, -1)
    scale_LBKS2 = (np.abs(half_LBKS2H).max(axis=-1) / 127).astype(np.float32)
    code_LBKS2H = np.nan_to_num(half_LBKS2H / scale_LBKS2[..., None], nan=99).round().astype(np.int8)
    meant = (code_LBKS2H * scale_LBKS2[..., None].astype(np.float64)).reshape(rows_LBKSC.shape)
    codes = jnp.asarray(code_LBKS2H.reshape(rows_LBKSC.shape))
    return codes, jnp.asarray(scale_LBKS2.swapaxes(-1, -2)), meant


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
    q_BNH, new_BKC, cache_LBKSC, length_B = inputs(lengths, S, K, G, H, dtype, window=window)
    spread_1S1 = np.exp2(np.random.default_rng(7).integers(-8, 3, (1, S, 1)))  # scales that differ from row to row
    codes, scales, meant = quantised(
        np.asarray(cache_LBKSC, np.float32) * np.where(np.arange(2 * H) < H, 1, spread_1S1)
    )
    out_BNH = ATTEND(
        *(q_BNH, new_BKC, codes, LAYER, length_B),
        scale_LBK2S=scales, window=window, soft_cap=soft_cap, mesh=mesh, backend=backend,
    )  # fmt: skip
    assert out_BNH.dtype == dtype
    expected_BNH = oracle.ragged_attention(q_BNH, new_BKC, meant, LAYER, length_B, window, soft_cap)
    oracle.assert_close(out_BNH, expected_BNH)
    v_BNH = jnp.repeat(new_BKC[..., H:], G, axis=1)
    for dead in (0, 3, 8):
        assert np.array_equal(out_BNH[dead], v_BNH[dead]), "an empty slot's answer is v_new, exactly"


@pytest.mark.parametrize("backend", ["xla", "xla_gpu", "pallas_interpret"])
def test_int8_by_hand(mesh, backend):
    """k = 4 x 0.25 gives the score log 3, as the new token has it; v = 8 x 0.5 and 8: the mean of 4 and 8."""
    H, S = 64, 128
    q_BNH = jnp.zeros((1, 1, H)).at[0, 0, 0].set(8.0 * np.log(3.0))
    new_BKC = jnp.zeros((1, 1, 2 * H)).at[0, 0, 0].set(1.0).at[0, 0, H:].set(8.0)
    codes = jnp.full((1, 1, 1, S, 2 * H), 77, jnp.int8).at[0, 0, 0, 0].set(0)
    codes = codes.at[0, 0, 0, 0, 0].set(4).at[0, 0, 0, 0, H:].set(8)
    scales = jnp.full((1, 1, 1, 2, S), jnp.nan).at[0, 0, 0, :, 0].set(jnp.array([0.25, 0.5]))
    out_BNH = ATTEND(
        q_BNH, new_BKC, codes, 0, jnp.array([1]), scale_LBK2S=scales, mesh=mesh, backend=backend
    )  # fmt: skip
    np.testing.assert_allclose(out_BNH, np.full((1, 1, H), 6.0), rtol=1e-6)


LIST = jax.jit(live_steps, static_argnames=("cache_len", "block", "cores"))


@pytest.mark.parametrize(
    ("cores", "window"), [(1, None), (2, None), (4, None), (1, 1), (1, 2), (2, 128), (1, 200), (4, 129), (2, 400)]
)
@pytest.mark.parametrize(
    "lengths", [[0, 1, 127, 0, 0, 128, 129, 384], [0, 0, 300, 0], [384, 0, 384, 0], [1, 1, 1, 1], [5, 0, 0, 0], [0] * 4]
)
def test_the_steps_are_the_live_blocks(lengths, cores, window):
    """The pipeline fetches a block when its index differs from the last step's: those must be the live ones, once each.

    A dead slot's step that moved the index would read HBM for nothing; a dead slot without a step has no answer.
    """
    block, S = 128, 384
    steps = LIST(jnp.array(lengths, jnp.int32), window, cache_len=S, block=block, cores=cores)
    N = len(lengths) // cores * (S // block)
    for core in range(cores):
        count = int(steps.count[core])
        listed = [
            (int(steps.slot[i]), int(steps.source[i]), int(steps.block[i])) for i in range(core * N, core * N + N)
        ]
        slots = range(core, len(lengths), cores)
        rows = {b: [j for j in range(lengths[b]) if window is None or j > lengths[b] - window] for b in slots}
        live = [(b, s) for b in slots for s in sorted({j // block for j in rows[b]})]
        fetched = [fetch for i, (_, *fetch) in enumerate(listed) if i == 0 or fetch != list(listed[i - 1][1:])]
        assert [tuple(fetch) for fetch in fetched[:1]] == live[:1] or not live, "the pipeline always fetches one block"
        assert [tuple(fetch) for fetch in fetched[1:]] == live[1:]
        answered = [b for b in slots for _ in range(max(1, len({j // block for j in rows[b]})))]
        assert [slot for slot, *_ in listed[:count]] == answered
        assert set(listed[count:]) <= {listed[count - 1]}, "the longer core's steps beyond this one's move nothing"


def test_two_cores():
    """On a chip with two cores the shorter list of steps is padded; a padded step must change nothing."""
    lengths, S, H = [200, 1, 0, 0, 256, 130], 256, 128
    q_BNH, new_BKC, cache_LBKSC, length_B = inputs(lengths, S, 1, 2, H, jnp.float32)
    steps = live_steps(length_B, None, S, 128, cores=2)
    assert steps.count.tolist() == [5, 4]
    out_BNH = ragged_attention_tpu(
        *(q_BNH, new_BKC, cache_LBKSC, None, jnp.int32(LAYER), length_B, None, steps),
        interpret=interpret_params("pallas_interpret"),
    )
    oracle.assert_close(out_BNH, oracle.ragged_attention(q_BNH, new_BKC, cache_LBKSC, LAYER, length_B))


@pytest.mark.slow
def test_steps_listed_once_for_all_layers(mesh):
    """What the engine does: the steps come from outside the layer loop."""
    args = inputs([0, 3, 200], 256, 1, 2, 64, jnp.float32)
    steps = attention_steps(args[2], args[3], mesh=mesh, backend="pallas_interpret")
    out_BNH = ATTEND(*args[:3], LAYER, args[3], steps, mesh=mesh, backend="pallas_interpret")
    assert np.array_equal(out_BNH, ATTEND(*args[:3], LAYER, args[3], mesh=mesh, backend="pallas_interpret"))
    assert attention_steps(args[2], args[3], mesh=mesh, backend="xla") is None


def test_sharded_equals_one_device(mesh, mesh_of_8):
    """Query heads and the kv heads they use must land on the same chip."""
    q_BNH, new_BKC, cache_LBKSC, length_B = inputs([0, 3, 200], 256, 8, 2, 64, jnp.float32)
    args = (q_BNH, new_BKC, cache_LBKSC, jnp.int32(LAYER), length_B)
    one = ATTEND(*args, mesh=mesh, backend="xla")
    eight = ATTEND(*args, mesh=mesh_of_8, backend="xla")
    np.testing.assert_allclose(eight, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("slots", "cache_length", "rows"),
    [(8, 4096, 1024), (8, 768, 768), (32, 4096, 1024), (128, 4096, 256), (2048, 4096, 128), (48, 4224, 640)],
)
def test_rows_of_a_gpu_block(monkeypatch, slots, cache_length, rows):
    """8 kv heads of 256 lanes in bf16, 4 KiB a row of a slot."""
    monkeypatch.undo()
    assert xla_gpu.rows_a_block(slots * 8 * 256 * 2, cache_length) == rows


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_block_size(K, H, dtype):
    for S in (128, 384, 512, 640, 1024, 8192):
        block = block_size(K, H, S, dtype)
        block_bytes = block * K * 2 * H * jnp.dtype(dtype).itemsize
        assert S % block == 0
        assert block % 128 == 0
        assert block == 128 or block_bytes <= TARGET_BYTES or (K, H, jnp.dtype(dtype).name) in TUNED
        assert 2 * block_bytes <= 4 * 1024 * 1024, "two of them must fit in VMEM beside the rest"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BNH": (2, 5, 64)}, "num_q_heads=5 must be divisible by num_kv_heads=2"),
        ({"q_BNH": (2, 4, 128)}, "C=128 lanes"),
        ({"new_BKC": (2, 1, 128)}, r"new_BKC must be \[B, K, C\] = \(2, 2, 128\), got \(2, 1, 128\)"),
        ({"cache_LBKSC": (3, 2, 2, 130, 128)}, "nearest above: 256"),
        (
            {"q_BNH": (2, 4, 80), "new_BKC": (2, 2, 160), "cache_LBKSC": (3, 2, 2, 128, 160), "backend": "pallas"},
            "pad heads to 128",
        ),
        ({"length_B": (3,)}, "length_B must be"),
        ({"layer": 3}, "layer=3"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"window": jnp.ones(2, jnp.int32)}, r"integer scalar, got int32\[2\]"),
        ({"window": 7.0}, r"integer scalar, got float32\[\]"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be above 0"),
        ({"scale": (3, 2, 2, 128, 2)}, r"scale_LBK2S must be \[L, B, K, 2, S\] = \(3, 2, 2, 2, 128\)"),
        ({"scale": (3, 2, 2, 2, 128)}, "has int8 codes and float32 scales"),
        ({"dtype": jnp.bfloat16}, "cast before the call"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"chips": 8}, "num_kv_heads=2 must be divisible by shards=8"),
    ],
)
def test_refuses(mesh, mesh_of_8, change, message):
    shapes = {
        "q_BNH": (2, 4, 64),
        "new_BKC": (2, 2, 128),
        "cache_LBKSC": (3, 2, 2, 128, 128),
        "length_B": (2,),
    } | change
    args = {
        "q_BNH": jnp.zeros(shapes["q_BNH"], change.get("dtype", jnp.float32)),
        "new_BKC": jnp.zeros(shapes["new_BKC"]),
        "cache_LBKSC": jnp.zeros(shapes["cache_LBKSC"]),
        "layer": change.get("layer", 0),
        "length_B": jnp.zeros(shapes["length_B"], jnp.int32),
        "window": change.get("window"),
        "soft_cap": change.get("soft_cap"),
        "scale_LBK2S": jnp.zeros(change["scale"]) if "scale" in change else None,
    }
    with pytest.raises(ValueError, match=message):
        ragged_attention(**args, mesh=mesh_of_8 if "chips" in change else mesh, backend=change.get("backend", "xla"))
