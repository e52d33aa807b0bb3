"""The C++ kernels as XLA calls them, by each level of vector instructions that this CPU has. `make native-check` runs
them without Python, under sanitizers."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from slipstream.kernels import native, ragged_attention, rms_norm
from slipstream.kernels.native import library
from slipstream.kernels.panel_matmul import PANEL, Panels, pack, pack_blocks, pack_int4, pack_int8, panel_matmul, unpack

from . import oracle
from .test_chunk_attention import Case

MULTIPLY = jax.jit(panel_matmul, static_argnames=("outputs", "backend"))
ATTEND = jax.jit(ragged_attention, static_argnames=("window", "soft_cap", "mesh", "backend"))
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(params=LEVELS)
def level(request):
    """Each level that the CPU runs; where it runs none, the library is not built, and that is told."""
    best = native.level()
    if LEVELS.index(request.param) > LEVELS.index(best):
        pytest.skip(f"this CPU has no {request.param}")
    native.use_level(request.param)
    yield request.param
    native.use_level(best)


def test_the_library_was_built_from_these_sources():
    assert native.is_built(), "the native kernels are older than their sources; build them anew: make setup"


def test_a_library_older_than_its_sources_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(library, "source_here", lambda: "of other sources")
    assert library._library.__wrapped__() is None
    assert "older than their sources, XLA's run instead; build them: pip install -e ." in caplog.text


def test_sources_are_looked_for_in_a_checkout_alone(monkeypatch, tmp_path):
    folder = tmp_path / "kernels" / "native"
    folder.mkdir(parents=True)
    monkeypatch.setattr(library, "SOURCES", folder)
    for name, text in {"b.h": "3", "b.cc": "2", "a.cc": "1", "a.py": "no source"}.items():
        (folder / name).write_text(text)
    assert library.source_here() is None
    (tmp_path / "setup.py").touch()
    assert library.source_here() == hashlib.sha256(b"123").hexdigest()


def test_a_level_that_the_cpu_has_not_is_refused():
    before = native.level()
    with pytest.raises(ValueError, match="does not run the kernels of name='avx9000'"):
        native.use_level("avx9000")
    assert native.level() == before


def test_a_layer_of_a_stack_is_multiplied_where_it_lies(level):
    """The number is traced, as a scan's; what is beyond the stack is clamped, as XLA does."""
    weight_LOI, x_RI = oracle.normal(0, 3, 70, 64), jnp.asarray(oracle.normal(1, 5, 64))
    layers = [pack(jnp.asarray(weight_OI), jnp.bfloat16) for weight_OI in weight_LOI]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for layer, of_stack in ((0, 0), (2, 2), (9, 2)):
        found = MULTIPLY(x_RI, stack, jnp.int32(layer), outputs=70, backend="native_cpu")
        alone = MULTIPLY(x_RI, layers[of_stack], outputs=70, backend="native_cpu")
        reference = MULTIPLY(x_RI, stack, jnp.int32(layer), outputs=70, backend="xla")
        np.testing.assert_array_equal(found, alone)
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 576), (3, 7), (2, 5, 64), (300, 513)])
def test_norms(level, shape):
    """Of rows and of heads, of whole vectors and of a rest, by one thread and by several."""
    x, weight_D = 30 * oracle.normal(0, *shape), oracle.normal(1, shape[-1])
    found = jax.jit(rms_norm, static_argnames=("eps", "backend"))(x, weight_D, eps=0.5, backend="native_cpu")
    wide = np.asarray(x, np.float64)
    expected = np.asarray(weight_D, np.float64) * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, weight_D, eps=0.5, backend="xla"), expected, rtol=1e-6)
    alone = rms_norm(x[-1:], weight_D, eps=0.5, backend="native_cpu")
    np.testing.assert_array_equal(alone, found[-1:])


def test_norms_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="must be float32, got bfloat16 and float32"):
        rms_norm(jnp.zeros((2, 8), jnp.bfloat16), jnp.zeros(8), eps=0.5, backend="native_cpu")
    with pytest.raises(ValueError, match=r"weight_D must be \[D\] = \(8,\), got \(4,\)"):
        rms_norm(jnp.zeros((2, 8)), jnp.zeros(4), eps=0.5, backend="native_cpu")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("I", "O"), [(288, 70), (33, 70), (64, 600)])
def test_products_with_codes(level, I, O, dtype):
    """33 inputs are odd in number, and no block divides them; 600 outputs are several panels for each thread."""
    rng = np.random.default_rng(1)
    R = 30
    x_RI = jnp.asarray(oracle.normal(1, R, I), dtype)
    kinds = [pack_int8(jnp.asarray(rng.integers(-128, 128, (O, I), np.int8)), oracle.normal(2, O))]
    if I % 32 == 0:
        packed = jnp.asarray(rng.integers(-128, 128, (I // 2, O), np.int8))
        kinds.append(pack_int4(packed, oracle.normal(3, I // 32, O), oracle.normal(4, I // 32, O)))
    for panels in kinds:
        check_product(x_RI, panels, np.asarray(unpack(panels, O, I)))


FORMS = ["f16", "blocks8", "blocks8 with offsets", "blocks4", "blocks4 in floats", "table", "table in floats", "float8"]


@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_weight_in_floats(level, form):
    """Bit by bit, whatever the number of rows: a weight is made by one rounding, its sums input after input."""
    rng, (O, Q, block) = np.random.default_rng(0), (70, 9, 32)
    grid_dtype = jnp.float32 if form.endswith("floats") else jnp.float16
    scale_OQ, offset_OQ = jnp.asarray(rng.normal(size=(2, O, Q)), jnp.float16).astype(grid_dtype)
    if form == "f16":
        panels = pack(jnp.asarray(oracle.normal(2, O, Q * block)), jnp.float16)
    elif form == "float8":
        code_OI = rng.integers(0, 256, (O, Q * block)).astype(np.uint8)
        code_OI[code_OI & 127 == 127] = 0x80
        scale_OQ = jnp.asarray(oracle.normal(2, O, Q))
        panels = pack_blocks(jnp.asarray(code_OI.view(ml_dtypes.float8_e4m3fn)), scale_OQ, None, 8)
    elif form.startswith("blocks8"):
        code_OI = jnp.asarray(rng.integers(-128, 128, (O, Q * block), np.int8))
        panels = pack_blocks(code_OI, scale_OQ, offset_OQ if form.endswith("offsets") else None, 8)
    else:
        code_OI = jnp.asarray(rng.integers(0, 16, (O, Q * block), np.int8))
        is_table = form.startswith("table")
        table = tuple(rng.integers(-128, 128, 16).tolist()) if is_table else ()
        panels = pack_blocks(code_OI, scale_OQ, None if is_table else offset_OQ, 4, table)
    floats = pack(unpack(panels, O, Q * block), jnp.float32)
    x_RI = jnp.asarray(oracle.normal(1, 30, Q * block))
    for rows in (1, 3, 8, 30):
        out_RO, expected_RO = (MULTIPLY(x_RI[:rows], of, outputs=O, backend="native_cpu") for of in (panels, floats))
        assert np.array_equal(out_RO, expected_RO)


@pytest.mark.parametrize("I", [34, 288, 512])
def test_every_float_of_8_bits_is_what_numpy_takes_it_for(level, I):
    """By products with one input at a time, one row and many; there is no NaN. One scale of all inputs."""
    code_OI = np.arange(256 * I).reshape(I, 256).T.astype(np.uint8) + np.arange(I, dtype=np.uint8)
    code_OI[code_OI & 127 == 127] = 0x80
    scale_O1 = oracle.normal(0, 256, 1)
    panels = pack_blocks(jnp.asarray(code_OI.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(scale_O1), None, 8)
    expected_OI = code_OI.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_O1
    for row in (0, I - 1):
        alone_RI = jnp.zeros((1, I)).at[0, row].set(1.0)
        panels_of_one = Panels(jnp.zeros_like(panels.code).at[:, row].set(panels.code[:, row]), panels.scale)
        for rows in (1, 20):
            out_RO = MULTIPLY(alone_RI.repeat(rows, axis=0), panels_of_one, outputs=256, backend="native_cpu")
            for out_O in np.asarray(out_RO):
                np.testing.assert_array_equal(out_O, expected_OI[:, row])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("R", "I"), [(8, 301), (13, 300), (200, 300)])
def test_products(level, R, I, dtype):
    """Few rows and many, by one thread or several; what fills the last panel up is NaN."""
    O = 200
    panels = pack(jnp.asarray(oracle.normal(2, O, I)), dtype)
    weight_OI = np.asarray(unpack(panels, O, I))
    filled_PX = np.arange(len(panels.code) * PANEL).reshape(-1, PANEL) >= O
    filled = filled_PX[:, None] if dtype == jnp.float32 else filled_PX[:, None, :, None]
    panels = Panels(jnp.where(filled, jnp.asarray(jnp.nan, dtype), panels.code))
    check_product(jnp.asarray(oracle.normal(1, R, I), dtype), panels, weight_OI)


LIVE = {
    "none": lambda row_R: row_R < 0,
    "one": lambda row_R: row_R == 7,
    "a piece": lambda row_R: row_R < 33,
    "more than a part": lambda row_R: row_R < 171,
    "a burst": lambda row_R: row_R % 64 < 9,
    "slots": lambda row_R: row_R % 5 != 1,
    "all": lambda row_R: row_R >= 0,
}


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "blocks4"])
def test_padding_is_left_out_of_products(level, form):
    """It is NaN, and gives zeros; what counts has the very bits that it has without padding. By one thread and several,
    in one part and in several, one behind another and gathered."""
    rng, (R, I, O) = np.random.default_rng(0), (200, 64, 200)
    if form == "int8":
        panels = pack_int8(jnp.asarray(rng.integers(-128, 128, (O, I), np.int8)), oracle.normal(2, O))
    elif form == "blocks4":
        code_OI, scale_OQ = jnp.asarray(rng.integers(0, 16, (O, I), np.int8)), jnp.asarray(oracle.normal(2, O, 2))
        panels = pack_blocks(code_OI, scale_OQ, scale_OQ, 4)
    else:
        panels = pack(jnp.asarray(oracle.normal(2, O, I)), jnp.dtype(form))
    x_RI = jnp.asarray(oracle.normal(1, R, I), jnp.bfloat16 if form == "bfloat16" else jnp.float32)
    expected_RO = MULTIPLY(x_RI, panels, outputs=O, backend="native_cpu")
    for told, of in LIVE.items():
        is_live_R = of(np.arange(R))
        padded_RI = jnp.where(is_live_R[:, None], x_RI, jnp.nan)
        out_RO = MULTIPLY(padded_RI, panels, None, jnp.asarray(is_live_R), outputs=O, backend="native_cpu")
        np.testing.assert_array_equal(out_RO, jnp.where(is_live_R[:, None], expected_RO, 0), told)
    of_xla_RO = MULTIPLY(padded_RI, panels, None, jnp.asarray(is_live_R), outputs=O, backend="xla")
    np.testing.assert_allclose(out_RO, of_xla_RO, rtol=1e-4, atol=1e-4 * np.abs(expected_RO).max())


def check_product(x_RI, panels, weight_OI):
    """Against float64; natively a row alone has the very bits that it has beside others."""
    O = len(weight_OI)
    expected_RO = np.asarray(x_RI).astype(np.float64) @ weight_OI.astype(np.float64).T
    for backend in ("native_cpu", "xla"):
        out_RO = MULTIPLY(x_RI, panels, outputs=O, backend=backend)
        assert out_RO.dtype == jnp.float32
        np.testing.assert_allclose(out_RO, expected_RO, rtol=1e-5, atol=1e-5 * np.abs(expected_RO).max())
        if backend == "native_cpu":
            for row in (0, len(x_RI) - 1):
                alone_RO = MULTIPLY(x_RI[row : row + 1], panels, outputs=O, backend=backend)
                assert np.array_equal(alone_RO[0], out_RO[row])


def test_activations_are_rounded_to_nearest_even(level):
    """By hand: 1 + 2^-8 is as near to 1 as to 1 + 2^-7, 1 + 3 / 2^8 to 1 + 2^-7 and 1 + 2^-6; within one program."""
    panels = pack(jnp.eye(2), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnames="backend")
    def of_floats(x_RI, backend):
        return panel_matmul(x_RI.astype(jnp.bfloat16), panels, outputs=2, backend=backend)

    for backend in ("native_cpu", "xla"):
        out_RO = of_floats(jnp.array([[1 + 2**-8, 1 + 3 * 2**-8]]), backend)
        assert out_RO.tolist() == [[1.0, 1 + 2**-6]]


@pytest.mark.parametrize(
    ("coded", "H", "W", "R"), [(False, 20, 1, 128), (False, 64, 5, 64), (True, 20, 4, 64), (True, 64, 1, 128)]
)
def test_attention(level, mesh, coded, H, W, R):
    """Lengths around a page's border, a window, a cap, an odd head; NaN in rows and scales that nobody may read."""
    K, G, L, layer = 2, 3, 2, 1
    length_B = np.array([0, 1, R - 1, R, R + 1, 2 * R], np.int32)
    B, S, window, cap = len(length_B), 2 * R, R - 8, 3.0
    before_BS = length_B[:, None] - np.arange(S)[None, :]
    used_BS = (before_BS > 0) & (before_BS < window)
    q_BWNH, new_BWKC = oracle.normal(3, B, W, K * G, H), oracle.normal(4, B, W, K, 2 * H)
    rows_LBKSC, options = oracle.normal(5, L, B, K, S, 2 * H), {"window": window, "soft_cap": cap}
    page_BJ, pool = oracle.table(length_B, S, R)
    if coded:
        rows_LBKSC = np.round(rows_LBKSC * 40).clip(-127, 127).astype(np.int8)
        scale_LBK2S = np.abs(oracle.normal(6, L, B, K, 2, S)) / 40
        scale_LBK2S = np.where(used_BS[None, :, None, None], scale_LBK2S, np.nan).astype(np.float32)
        options["scale_LPK2R"] = oracle.paged(scale_LBK2S, page_BJ, pool, R, row_axis=4)
    else:
        rows_LBKSC = np.where(used_BS[None, :, None, :, None], rows_LBKSC, np.nan).astype(np.float32)
    args = (q_BWNH, new_BWKC, oracle.paged(jnp.asarray(rows_LBKSC), page_BJ, pool, R), layer, jnp.asarray(length_B))
    out_BWNH, expected_BWNH = (
        ATTEND(*args, jnp.asarray(page_BJ), **options, mesh=mesh, backend=backend) for backend in ("native_cpu", "xla")
    )
    np.testing.assert_allclose(out_BWNH, expected_BWNH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coded", [False, True])
def test_slots_that_share_pages_are_as_alone(level, mesh, coded):
    """Two families of texts in turns; a text's result has the same bits whoever begins like it. NaN in free pages."""
    B, K, G, H, R, J = 41, 4, 2, 20, 16, 3
    length_B = np.array([(3 * R, 0, R, 2 * R + 5, R - 1, R + 1)[b % 6] for b in range(B)], np.int32)
    page_BJ = 4 + np.arange(B * J, dtype=np.int32).reshape(B, J)
    for j in range(2):
        page_BJ[:, j] = np.where((j + 1) * R <= length_B, 2 * j + np.arange(B) // 6 % 2, page_BJ[:, j])
    is_used_PR = np.zeros((4 + B * J, R), bool)
    for length, page_J in zip(length_B, page_BJ, strict=True):
        for token in range(length):
            is_used_PR[page_J[token // R], token % R] = True
    rows_LPKRC = oracle.normal(1, 1, len(is_used_PR), K, R, 2 * H)
    options = {}
    if coded:
        rows_LPKRC = np.round(rows_LPKRC * 40).clip(-127, 127).astype(np.int8)
        scale_LPK2R = np.abs(oracle.normal(2, 1, len(is_used_PR), K, 2, R)) / 40
        options["scale_LPK2R"] = jnp.asarray(np.where(is_used_PR[:, None, None], scale_LPK2R, np.nan), jnp.float32)
    else:
        rows_LPKRC = np.where(is_used_PR[:, None, :, None], rows_LPKRC, np.nan)
    cache_LPKRC = jnp.asarray(rows_LPKRC, jnp.int8 if coded else jnp.float32)
    q_BWNH, new_BWKC = oracle.normal(3, B, 1, K * G, H), oracle.normal(4, B, 1, K, 2 * H)

    def attended(backend, slots):
        args = (jnp.asarray(array[slots]) for array in (q_BWNH, new_BWKC))
        where = jnp.asarray(length_B[slots]), jnp.asarray(page_BJ[slots])
        return np.asarray(ATTEND(*args, cache_LPKRC, 0, *where, **options, mesh=mesh, backend=backend))

    all_slots = np.arange(B)
    out_BWNH = attended("native_cpu", all_slots)
    np.testing.assert_allclose(out_BWNH, attended("xla", all_slots), rtol=1e-5, atol=1e-5)
    for slot in (0, 1, 3, 9, 11):
        np.testing.assert_array_equal(attended("native_cpu", all_slots[slot : slot + 1])[0], out_BWNH[slot])


@pytest.mark.parametrize(
    ("int8", "H", "tokens", "rows"), [(False, 20, 33, 128), (False, 64, 200, 64), (True, 20, 33, 16)]
)
def test_attention_of_chunks(level, mesh, int8, H, tokens, rows):
    """Pieces of two texts, a window that ends within a page, a cap, an odd head; NaN in pages that nobody may read."""
    Case([256, 0], tokens, 2, 3, H, window=150, int8=int8, rows=rows).check("native_cpu", mesh, soft_cap=3.0)


@pytest.mark.parametrize("counts", [[0, 1, 70], [33, 64, 69], [70, 32, 0]])
def test_padding_is_left_out_of_attention(level, mesh, counts):
    """It is NaN, and gives zeros; what counts has the very bits that it has without padding."""
    case = Case([128, 0, 128], 70, 2, 3, 20, rows=64)
    expected_TNH = case.attend("native_cpu", mesh)
    is_live_T11 = (np.arange(70) < np.array(counts)[:, None]).reshape(-1, 1, 1)
    case.q_TNH, case.k_TKH, case.v_TKH = (
        jnp.where(is_live_T11, x, jnp.nan) for x in (case.q_TNH, case.k_TKH, case.v_TKH)
    )
    out_TNH = case.attend("native_cpu", mesh, count_M=jnp.int32(counts))
    np.testing.assert_array_equal(out_TNH, jnp.where(is_live_T11, expected_TNH, 0))
