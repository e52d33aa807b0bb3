import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import cache_flush
from slipstream.kernels.backend import interpret_params
from slipstream.kernels.cache_flush.pallas_tpu import (
    VMEM_BYTES,
    cache_flush_tpu,
    layer_group,
    slots_to_write,
    tile_rows,
)

from tests.tpu import memory_of

from . import oracle

R = 128
FLUSH = jax.jit(cache_flush, static_argnames=("row_axis", "mesh", "backend"))


def pages_of(B, J=2, seed=3):
    """(page_BJ scattered over a pool, the pool's pages), two of which are in no table."""
    pool = B * J + 2
    return np.random.default_rng(seed).permutation(pool)[: B * J].reshape(B, J).astype(np.int32), pool


def inputs(L, K, C, dtype, positions):
    """A cache with NaN in half of its rows, new rows, positions, pages."""
    B = len(positions)
    page_BJ, pool = pages_of(B)
    cache_LPKRC, new_LBKC = (
        np.clip(np.asarray(oracle.normal(seed, *shape, times=50)), -128, 127).astype(jnp.dtype(dtype))
        for seed, shape in enumerate([(L, pool, K, R, C), (L, B, K, C)])
    )
    if jnp.issubdtype(dtype, jnp.floating):
        cache_LPKRC[:, :, :, ::2] = np.nan
    return tuple(map(jnp.asarray, (cache_LPKRC, new_LBKC, np.array(positions, np.int32), page_BJ)))


def expected(cache_LPKRC, new_LBKC, position_B, page_BJ):
    """Row by row."""
    cache_LPKRC, new_LBKC, page_BJ = np.array(cache_LPKRC), np.asarray(new_LBKC), np.asarray(page_BJ)
    for b, position in enumerate(np.asarray(position_B).tolist()):
        if 0 <= position < page_BJ.shape[1] * R:
            cache_LPKRC[:, page_BJ[b, position // R], :, position % R] = new_LBKC[:, b]
    return cache_LPKRC


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
@pytest.mark.parametrize(
    ("K", "C", "dtype"),
    [
        (1, 256, jnp.bfloat16),
        (3, 128, jnp.float32),
        pytest.param(4, 128, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(2, 256, jnp.int8, marks=pytest.mark.slow),
    ],
)
def test_writes_its_rows_and_nothing_else(mesh, backend, K, C, dtype):
    """A dead slot (-1) or a full one (2 R) that wrote anywhere, or a neighbour that changed, even a NaN's bits."""
    tile = tile_rows(dtype)
    positions = [-1, 0, 1, tile - 1, tile, R - 1, R, 2 * R, -1, 2 * R - 1, R + tile, 2 * R + tile, -R]
    args = inputs(3, K, C, dtype, positions)
    out_LPKRC = FLUSH(*args, mesh=mesh, backend=backend)
    assert np.array_equal(oracle.bits(out_LPKRC), oracle.bits(expected(*args)))


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
def test_nothing_to_write_changes_nothing(mesh, backend):
    args = inputs(2, 1, 128, jnp.float32, [-1, 2 * R, -5])
    assert np.array_equal(oracle.bits(FLUSH(*args, mesh=mesh, backend=backend)), oracle.bits(args[0]))


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
@pytest.mark.parametrize(
    ("K", "B"), [(1, 9), pytest.param(3, 9, marks=pytest.mark.slow), pytest.param(1, 130, marks=pytest.mark.slow)]
)
def test_scales_are_written_on_the_lanes(mesh, backend, K, B):
    """Rows last: a lane's neighbours keep their bits, and a slot gets its own scales, the 129th too."""
    rows, positions = 256, ([0, 1, 127, 128, 255, 256, -1, 511, 512] * 15)[:B]
    page_BJ, pool = pages_of(B)
    scale_LPK2R, new_LBK2 = oracle.normal(0, 2, pool, K, 2, rows), oracle.normal(1, 2, B, K, 2)
    scale_LPK2R = jnp.where(jnp.arange(rows) % 2 == 0, jnp.nan, scale_LPK2R)
    args = (scale_LPK2R, new_LBK2, jnp.array(positions), jnp.asarray(page_BJ))
    out = FLUSH(*args, row_axis=4, mesh=mesh, backend=backend)
    expected_LPK2R, new_LBK2 = np.array(scale_LPK2R), np.asarray(new_LBK2)
    for b, position in enumerate(positions):
        if 0 <= position < 2 * rows:
            expected_LPK2R[:, page_BJ[b, position // rows], :, :, position % rows] = new_LBK2[:, b]
    assert np.array_equal(oracle.bits(out), oracle.bits(expected_LPK2R))


def test_several_layer_groups():
    """Layers in groups that the budget cuts: 6 layers, room for 4, so 3 a step. Two cores have 3 layers each."""
    layer_bytes = 4 * 8 * 128 * 4
    assert layer_group(6, 1, 128, jnp.float32, 4 * layer_bytes) == 3
    cache_LPKRC, new_LBKC, position_B, page_BJ = inputs(6, 1, 128, jnp.float32, [5, 2 * R, 127])
    page_B, row_B = page_BJ[:, 0], jnp.where(position_B < R, position_B, -1)
    for cores, vmem_bytes in ((1, 4 * layer_bytes), (2, VMEM_BYTES)):
        out_LPKRC = cache_flush_tpu(
            *(cache_LPKRC, new_LBKC, page_B, row_B), row_axis=3, cores=cores,
            interpret=interpret_params("pallas_interpret"), vmem_bytes=vmem_bytes,
        )  # fmt: skip
        assert np.array_equal(oracle.bits(out_LPKRC), oracle.bits(expected(cache_LPKRC, new_LBKC, position_B, page_BJ)))


@pytest.mark.parametrize(
    ("row_B", "count", "slots"), [([-1, 3, -1, 9], 2, [1, 3]), ([0, 1, 2, 3], 4, [0, 1, 2, 3]), ([-1] * 4, 1, [])]
)
def test_slots_with_nothing_to_write_have_no_step(row_B, count, slots):
    page_B = jnp.array([40, 41, 42, 43], jnp.int32)
    listed, slot_B, pages_B, rows_B = slots_to_write(page_B, jnp.array(row_B, jnp.int32))
    n = len(slots)
    assert (int(listed), slot_B.tolist()[:n], pages_B.tolist()[:n]) == (count, slots, [40 + b for b in slots])
    assert rows_B.tolist() == [row_B[b] for b in slots] + [-1] * (4 - n)


@pytest.mark.parametrize(
    ("num_layers", "num_kv_heads", "row_lanes", "dtype", "group"),
    [
        (32, 4, 256, jnp.bfloat16, 32),  # Llama-2-7B on 8 chips: 2 MiB, all layers in one step
        (80, 1, 256, jnp.bfloat16, 80),  # Llama-3.1-70B
        (30, 3, 128, jnp.float32, 30),  # SmolLM2-135M on one chip
        (32, 32, 256, jnp.bfloat16, 16),  # Llama-2-7B on one chip: 0.5 MiB a layer
        (31, 32, 256, jnp.bfloat16, 1),  # a prime
    ],
)
def test_layer_group(num_layers, num_kv_heads, row_lanes, dtype, group):
    assert layer_group(num_layers, num_kv_heads, row_lanes, dtype, VMEM_BYTES) == group


def test_tile_rows():
    assert [tile_rows(d) for d in (jnp.float32, jnp.bfloat16, jnp.int8)] == [8, 8, 32]


@pytest.mark.parametrize(
    ("dtype", "row_axis", "shape"),
    [(jnp.float32, 3, (8, 9, 3, R, 128)), (jnp.int8, 3, (8, 9, 3, R, 128)), (jnp.float32, 4, (8, 9, 3, 2, 8 * R))],
)
def test_xla_is_in_place(mesh, dtype, row_axis, shape):
    """A copy of the cache per step would cost more than the step."""
    cache, position_B, page_BJ = jnp.zeros(shape, dtype), jnp.array([0, 5, 99, 2 * R]), jnp.asarray(pages_of(4)[0])
    new = jnp.take(cache[:, :4], 0, axis=row_axis)
    flush = jax.jit(functools.partial(cache_flush, row_axis=row_axis, mesh=mesh, backend="xla"), donate_argnums=0)
    memory = memory_of(flush.lower(cache, new, position_B, page_BJ).compile())
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 20


def test_sharded_equals_one_device(mesh, mesh_of_8):
    args = inputs(2, 8, 128, jnp.float32, [0, 2 * R, 77])
    one, eight = FLUSH(*args, mesh=mesh, backend="xla"), FLUSH(*args, mesh=mesh_of_8, backend="xla")
    assert np.array_equal(oracle.bits(one), oracle.bits(eight))


@pytest.mark.parametrize(
    ("new_shape", "new_dtype", "page_shape", "message"),
    [
        ((2, 1, 1, 64), jnp.float32, (1, 2), r"new must be \[L, B, K, C\]"),
        ((2, 1, 1, 128), jnp.bfloat16, (1, 2), "encode the new rows first"),
        ((2, 1, 1, 128), jnp.float32, (2, 2), r"page_BJ must be \[B, J\]"),
    ],
)
def test_refuses(mesh, new_shape, new_dtype, page_shape, message):
    cache_LPKRC, new_LBKC = jnp.zeros((2, 3, 1, R, 128)), jnp.zeros(new_shape, new_dtype)
    page_BJ = jnp.zeros(page_shape, jnp.int32)
    with pytest.raises(ValueError, match=message):
        cache_flush(cache_LPKRC, new_LBKC, jnp.zeros(1, jnp.int32), page_BJ, mesh=mesh, backend="xla")
