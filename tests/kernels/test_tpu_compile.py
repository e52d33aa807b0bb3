"""The kernels under the real TPU compiler: they fit the chip, and the cache is never copied."""

import functools

import jax
import jax.numpy as jnp
import pytest
from slipstream.cache_manager.codec import Int8
from slipstream.kernels import (
    attention_steps,
    cache_flush,
    chunk_attention,
    page_rows,
    ragged_attention,
)

from .. import tpu
from ..tpu import abstract, compile_for, layer_sized_copies, memory_of, nbytes, tpu_mesh

L, B, S = 4, 96, 4096
CASES = [  # kv heads a chip, group, H, dtype
    (1, 4, 128, jnp.bfloat16),
    (4, 1, 128, jnp.bfloat16),
    (4, 2, 128, jnp.bfloat16),
    (1, 8, 64, jnp.bfloat16),
    (4, 3, 64, jnp.bfloat16),
    (3, 3, 64, jnp.float32),
]
PRODUCT = (pytest.mark.slow, pytest.mark.product)


def heads(*quick, among=(0, 1, 2, 3, 4, 5)):
    """Cases by their places on one chip, `quick` ones and slow ones. Of eight chips each has a program of the same
    shapes, so those take the quick ones and leave the others to the product."""
    cases = [pytest.param(1, *CASES[i], marks=() if i in quick else pytest.mark.slow) for i in among]
    cases += [pytest.param(8, *CASES[i], marks=pytest.mark.slow if i in quick else PRODUCT) for i in among]
    return pytest.mark.parametrize(("chips", "K", "G", "H", "dtype"), cases)


# Each case's two kernels are compiled together in `test_step`, but for the one without groups.
HEADS = heads(1, 5)


def page_shape(mesh, K, H, dtype):
    """(P, R) of a pool that holds all slots' longest requests; K is per chip."""
    rows = page_rows(K, H, S, dtype, mesh.devices.flat[0].device_kind)
    return B * S // rows, rows


def arrays(mesh, K, G, H, dtype, W=1):
    """q, new (of a step), cache, layer, length, pages; K is per chip, W tokens a slot."""
    pool, rows = page_shape(mesh, K, H, dtype)
    K *= mesh.size
    return (
        abstract(mesh, (B, W, K * G, H), dtype, None, None, "tensor"),
        abstract(mesh, (L, B, W, K, 2 * H), dtype, None, None, None, "tensor"),
        abstract(mesh, (L, pool, K, rows, 2 * H), dtype, None, None, "tensor"),
        abstract(mesh, (), jnp.int32),
        abstract(mesh, (B,), jnp.int32),
        abstract(mesh, (B, S // rows), jnp.int32),
    )


def assert_no_copy_of(cache, compiled):
    assert memory_of(compiled).temp_size_in_bytes < nbytes(cache) / 20
    assert layer_sized_copies(compiled, cache) == []


@HEADS
def test_ragged_attention(chips, K, G, H, dtype):
    mesh = tpu_mesh(chips=chips)
    args = arrays(mesh, K, G, H, dtype)

    def attend(q_BWNH, new_LBWKC, cache_LPKRC, layer, length_B, page_BJ):
        args = (q_BWNH, new_LBWKC[0], cache_LPKRC, layer, length_B, page_BJ)
        return ragged_attention(*args, mesh=mesh, backend="pallas")

    assert_no_copy_of(args[2], compile_for(mesh, attend, *args))


@HEADS
def test_cache_flush(chips, K, G, H, dtype):
    mesh = tpu_mesh(chips=chips)
    _, new_LBWKC, cache_LPKRC, _, position_B, page_BJ = arrays(mesh, K, G, H, dtype)
    flush = functools.partial(cache_flush, mesh=mesh, backend="pallas")
    compiled = compile_for(mesh, flush, cache_LPKRC, new_LBWKC, position_B, position_B, page_BJ, donate=(0,))
    assert_no_copy_of(cache_LPKRC, compiled)
    assert memory_of(compiled).alias_size_in_bytes == nbytes(cache_LPKRC)


def decode_step(mesh, flush, weight_LDD, token_RD, cache_LPKRC, length_B, page_BJ):
    """A step's shape: every layer reads the cache and returns its new rows; one flush at the end."""
    K, C = cache_LPKRC.shape[2], cache_LPKRC.shape[4]
    steps = attention_steps(cache_LPKRC, length_B, page_BJ, mesh=mesh, backend="pallas")

    def layer(x_RD, weight_and_layer):
        weight_DD, layer = weight_and_layer
        y_RD = x_RD @ weight_DD
        q_BWNH = y_RD.reshape(B, -1, y_RD.shape[1] * 2 // C, C // 2)
        new_BWKC = y_RD[:, : K * C].reshape(B, -1, K, C)
        args = (q_BWNH, new_BWKC, cache_LPKRC, layer, length_B, page_BJ, steps)
        out_BWNH = ragged_attention(*args, mesh=mesh, backend="pallas")
        return x_RD + out_BWNH.reshape(x_RD.shape), new_BWKC

    token_RD, new_LBWKC = jax.lax.scan(layer, token_RD, (weight_LDD, jnp.arange(L)))
    return token_RD, flush(cache_LPKRC, new_LBWKC, length_B, jnp.minimum(length_B, 1), page_BJ)


def compile_step(chips, K, G, H, dtype, flush_of, *, topology="v5e:2x4", W=1):
    mesh = tpu_mesh(topology, chips=chips)
    _, _, cache_LPKRC, _, length_B, page_BJ = arrays(mesh, K, G, H, dtype)
    D = max(K * G * H, 2 * K * H) * mesh.size
    weight_LDD = abstract(mesh, (L, D, D), dtype, None, None, "tensor")
    step = functools.partial(decode_step, mesh, flush_of(mesh))
    token_RD = abstract(mesh, (B * W, D), dtype)
    args = (weight_LDD, token_RD, cache_LPKRC, length_B, page_BJ)
    return cache_LPKRC, compile_for(mesh, step, *args, donate=(2,))


def assert_step_is_clean(chips, K, G, H, dtype, **options):
    def flush_of(mesh):
        return functools.partial(cache_flush, mesh=mesh, backend="pallas")

    cache_LPKRC, compiled = compile_step(chips, K, G, H, dtype, flush_of, **options)
    assert_no_copy_of(cache_LPKRC, compiled)
    assert memory_of(compiled).alias_size_in_bytes == nbytes(cache_LPKRC)


@heads(2, 3, 5, among=(0, 2, 3, 4, 5))
def test_step(chips, K, G, H, dtype):
    """Layouts are chosen per module: kernels that are clean alone may disagree about the cache's inside a step."""
    assert_step_is_clean(chips, K, G, H, dtype)


@pytest.mark.parametrize(
    ("topology", "chips", "case", "W"),
    [
        ("v5e:2x4", 1, CASES[2], 4),
        *(
            pytest.param(topology, chips, CASES[case], W, marks=pytest.mark.slow)
            for topology, chips, case, W in [
                ("v5e:2x4", 8, 0, 4),
                ("v5e:2x4", 1, 3, 8),
                ("v5e:2x4", 1, 5, 3),
                ("v4:2x2x1", 1, 0, 4),
                ("v5p:2x2x1", 1, 4, 4),
                ("v6e:2x2", 1, 1, 4),
            ]
        ),
    ],
)
def test_step_of_several_tokens(topology, chips, case, W):
    assert_step_is_clean(chips, *case, topology=topology, W=W)


def test_the_gate_sees_copies():
    """Guards the gate itself: a flush by vmapped update-slices wants another layout than the kernel."""

    def flush_of(mesh):
        del mesh

        def write(page_LKRC, new_LKC, row):
            return jax.lax.dynamic_update_slice(page_LKRC, new_LKC[:, :, None], (0, 0, row, 0))

        def flush(cache_LPKRC, new_LBWKC, length_B, count_B, page_BJ):
            del count_B
            new_LBKC, J = new_LBWKC[:, :, 0], page_BJ.shape[1]
            new_LPKC, row_P = (jnp.repeat(x, J, axis) for x, axis in ((new_LBKC, 1), (length_B, 0)))
            return jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)(cache_LPKRC, new_LPKC, row_P)

        return flush

    cache_LPKRC, compiled = compile_step(1, 4, 2, 128, jnp.bfloat16, flush_of)
    assert layer_sized_copies(compiled, cache_LPKRC)


@pytest.mark.parametrize(
    ("slots", "length", "pool"),
    [(512, 32768, 4096), pytest.param(16, 131072, 8192, marks=pytest.mark.slow)],
)
def test_lists_of_many_slots_and_of_long_ones_fit_into_scalar_memory(slots, length, pool):
    """1 MiB for the page table while the lists are made, and for the lists while attention runs."""
    mesh, rows = tpu_mesh(chips=1), 256
    shapes = ((slots, 1, 4, 128), (slots, 1, 1, 256), (1, pool, 1, rows, 256))
    args = [abstract(mesh, shape, jnp.bfloat16) for shape in shapes]
    scalars = [abstract(mesh, shape, jnp.int32) for shape in ((), (slots,), (slots, length // rows))]
    attend = functools.partial(ragged_attention, mesh=mesh, backend="pallas")
    assert_no_copy_of(args[2], compile_for(mesh, attend, *args, *scalars))


@pytest.mark.parametrize(
    ("topology", "cases"),
    [
        pytest.param(topology, cases, marks=marks)
        for topology in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2")
        for cases, marks in (((0, 4, 5), pytest.mark.slow), ((1, 2, 3), PRODUCT))
    ],
)
def test_other_chips(topology, cases):
    """Each number of kv heads, of lanes and type; the others differ in their groups, and are compiled for a v5e."""
    mesh = tpu_mesh(topology, chips=1)
    for K, G, H, dtype in map(CASES.__getitem__, cases):
        q_BWNH, new_LBWKC, cache_LPKRC, layer, length_B, page_BJ = arrays(mesh, K, G, H, dtype)
        new_BWKC = abstract(mesh, new_LBWKC.shape[1:], dtype)
        attend = functools.partial(ragged_attention, mesh=mesh, backend="pallas")
        compile_for(mesh, attend, q_BWNH, new_BWKC, cache_LPKRC, layer, length_B, page_BJ)
        flush = functools.partial(cache_flush, mesh=mesh, backend="pallas")
        compiled = compile_for(mesh, flush, cache_LPKRC, new_LBWKC, length_B, length_B, page_BJ, donate=(0,))
        assert_no_copy_of(cache_LPKRC, compiled)


@pytest.mark.parametrize(
    ("topology", "chips", "K", "G", "H", "W"),
    [
        ("v5e:2x4", 1, 4, 3, 64, 1),
        ("v5e:2x4", 1, 1, 8, 64, 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("v5e:2x4", 1, 1, 4, 128, 8),
                ("v5e:2x4", 8, 4, 2, 128, 1),
                ("v5p:2x2x1", 1, 4, 3, 64, 4),
                ("v6e:2x2", 1, 4, 2, 128, 4),
                ("v4:2x2x1", 1, 1, 4, 128, 4),
            ]
        ),
        pytest.param("v5e:2x4", 1, 4, 3, 64, 3, marks=PRODUCT),
    ],
)
def test_int8(topology, chips, K, G, H, W):
    """Codes and scales: neither is copied, and the scales take the 8 bytes a token that they should."""
    mesh = tpu_mesh(topology, chips=chips)
    q_BWNH, new_LBWKC, code_LPKRC, layer, length_B, page_BJ = arrays(mesh, K, G, H, jnp.int8, W)
    q_BWNH, new_LBWKC = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding) for x in (q_BWNH, new_LBWKC))
    pool, rows = page_shape(mesh, K, H, jnp.int8)
    scale_LPK2R = abstract(mesh, (L, pool, K * chips, 2, rows), jnp.float32, None, None, "tensor")

    def step(q_BWNH, new_LBWKC, code_LPKRC, scale_LPK2R, layer, length_B, page_BJ):
        args = (q_BWNH, new_LBWKC[0], code_LPKRC, layer, length_B, page_BJ)
        out_BWNH = ragged_attention(*args, scale_LPK2R=scale_LPK2R, mesh=mesh, backend="pallas")
        new = Int8().encode(new_LBWKC + out_BWNH[0, 0, 0, 0])  # the flush comes after the attention
        flush = functools.partial(cache_flush, mesh=mesh, backend="pallas")
        assert new.scales is not None
        where = (length_B, jnp.minimum(length_B, W), page_BJ)
        code_LPKRC = flush(code_LPKRC, new.rows, *where)
        return code_LPKRC, flush(scale_LPK2R, new.scales, *where, row_axis=4), out_BWNH

    args = (q_BWNH, new_LBWKC, code_LPKRC, scale_LPK2R, layer, length_B, page_BJ)
    compiled = compile_for(mesh, step, *args, donate=(2, 3))
    assert_no_copy_of(code_LPKRC, compiled)
    assert layer_sized_copies(compiled, scale_LPK2R) == []
    cache_bytes = nbytes(code_LPKRC) + nbytes(scale_LPK2R)
    assert cache_bytes == L * B * K * S * (2 * H + 8)
    assert memory_of(compiled).alias_size_in_bytes == cache_bytes


WINDOWS = [(*CASES[2], 4), (*CASES[3], 1), (2, 4, 256, jnp.bfloat16, 5)]


@pytest.mark.parametrize(
    ("topology", "K", "G", "H", "dtype", "W"),
    [
        *(("v5e:2x4", *case) for case in WINDOWS[:2]),
        *(pytest.param(t, *WINDOWS[i], marks=pytest.mark.slow) for t, i in (("v6e:2x2", 0), ("v5p:2x2x1", 2))),
        *(
            pytest.param(t, *WINDOWS[i], marks=PRODUCT)
            for t, left in (("v5e:2x4", (2,)), ("v5p:2x2x1", (0, 1)), ("v6e:2x2", (1, 2)))
            for i in left
        ),
    ],
)
def test_window_and_soft_cap(topology, K, G, H, dtype, W):
    """A window that is known at run time only, as under a scan over layers of two kinds."""
    mesh = tpu_mesh(topology, chips=1)
    args = arrays(mesh, K, G, H, dtype, W)

    def attend(q_BWNH, new_LBWKC, cache_LPKRC, layer, length_B, page_BJ, window):
        args = (q_BWNH, new_LBWKC[0], cache_LPKRC, layer, length_B, page_BJ)
        return ragged_attention(*args, window=window, soft_cap=50.0, mesh=mesh, backend="pallas")

    compiled = compile_for(mesh, attend, *args, args[3])
    assert_no_copy_of(args[2], compiled)


CHUNKS = [  # texts, their tokens, kv heads a chip, group, H, dtype of rows, window, soft cap
    (1, 512, 1, 4, 128, jnp.bfloat16, False, None),
    (8, 64, 4, 3, 64, jnp.int8, True, 50.0),
    (1, 16, 1, 4, 128, jnp.bfloat16, False, None),
    (1, 2048, 8, 4, 128, jnp.bfloat16, False, None),
    (1, 512, 4, 1, 128, jnp.bfloat16, True, None),
    (1, 1024, 3, 3, 64, jnp.float32, False, None),
    (1, 256, 8, 8, 256, jnp.bfloat16, False, None),
    (1, 256, 1, 71, 64, jnp.bfloat16, False, None),
    (1, 512, 8, 1, 64, jnp.int8, False, None),
    (1, 512, 2, 2, 256, jnp.int8, True, 50.0),
]
OTHER_CHIPS = [("v5e:2x4", 8, [1]), ("v4:2x2x1", 1, [1, 3]), ("v5p:2x2x1", 1, [1, 4]), ("v6e:2x2", 1, [1, 3])]
"""Each with the chunks that have the most in them: codes, a window, a soft cap and several texts; the most rows."""


@pytest.mark.parametrize(
    ("topology", "chips", "chunk"),
    [
        ("v5e:2x4", 1, CHUNKS[0]),
        ("v5e:2x4", 1, CHUNKS[1]),
        *(pytest.param("v5e:2x4", 1, chunk, marks=pytest.mark.slow) for chunk in CHUNKS[2:]),
        *(
            pytest.param(topology, chips, CHUNKS[i], marks=pytest.mark.slow if i in chosen else PRODUCT)
            for topology, chips, chosen in OTHER_CHIPS
            for i in (range(3) if chips == 8 else range(5))
        ),
    ],
)
def test_chunk_attention(topology, chips, chunk):
    """Pages are read where they lie, a few heads of many too."""
    texts, tokens, K, G, H, dtype, has_window, soft_cap = chunk
    mesh, model = tpu_mesh(topology, chips=chips), jnp.bfloat16 if dtype == jnp.int8 else dtype
    pool, rows = page_shape(mesh, K, H, dtype)
    q_TNH, k_TKH, v_TKH = (
        abstract(mesh, (texts * tokens, heads * chips, H), model, None, "tensor") for heads in (K * G, K, K)
    )
    cache_LPKRC = abstract(mesh, (L, pool, K * chips, rows, 2 * H), dtype, None, None, "tensor")
    scale_LPK2R = None
    if dtype == jnp.int8:
        scale_LPK2R = abstract(mesh, (L, pool, K * chips, 2, rows), jnp.float32, None, None, "tensor")
    layer, start_M, page_MJ = (abstract(mesh, at, jnp.int32) for at in ((), (texts,), (texts, S // rows)))

    def attend(q_TNH, k_TKH, v_TKH, cache_LPKRC, scale_LPK2R, layer, start_M, page_MJ, window):
        return chunk_attention(
            q_TNH, k_TKH, v_TKH, cache_LPKRC, layer, start_M, page_MJ,
            scale_LPK2R=scale_LPK2R, window=window, soft_cap=soft_cap, mesh=mesh, backend="pallas",
        )  # fmt: skip

    args = q_TNH, k_TKH, v_TKH, cache_LPKRC, scale_LPK2R, layer, start_M, page_MJ, layer if has_window else None
    assert_no_copy_of(cache_LPKRC, compile_for(mesh, attend, *args))


def test_a_program_is_compiled_once_for_its_text_chips_and_flags(tmp_path, monkeypatch):
    """What is kept of it is what the compiler tells."""
    made, compile_it = [], jax.stages.Lowered.compile
    monkeypatch.setattr(tpu, "KEPT", tmp_path)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: made.append(1) or compile_it(lowered))

    def told(factor, topology="v5e:2x4"):
        mesh = tpu_mesh(topology, chips=1)
        x = abstract(mesh, (8, 128), jnp.float32)
        return compile_for(mesh, lambda x: (x * factor, None), x)

    first, again = told(2), told(2)
    assert (again, len(made)) == (first, 1)
    assert "multiply" in first.text
    assert memory_of(first).output_size_in_bytes >= 4096
    assert first.inputs == ((first.outputs[0],), {})
    assert told(3).text != first.text
    told(2, "v6e:2x2")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=16384")
    told(2)
    assert len(made) == 4
