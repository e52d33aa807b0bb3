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
    tile_rows,
    tiles_to_write,
)

from tests.arrays import array
from tests.tpu import memory_of

from . import oracle

R = 128
FLUSH = jax.jit(cache_flush, static_argnames=("row_axis", "mesh", "backend"))
TILES = jax.jit(tiles_to_write, static_argnames=("tokens", "tile", "rows"))


def pages_of(B, J=2, seed=3):
    """(page_BJ scattered over a pool, the pool's pages), two of which are in no table."""
    pool = B * J + 2
    return np.random.default_rng(seed).permutation(pool)[: B * J].reshape(B, J).astype(np.int32), pool


def inputs(L, K, C, dtype, positions, counts=None, W=1):
    """A cache with NaN in half of its rows, new rows with NaN behind a slot's count, positions, counts (W), pages."""
    B = len(positions)
    page_BJ, pool = pages_of(B)
    count_B = np.array(counts or [W] * B, np.int32)
    cache_LPKRC, new_LBWKC = (
        np.clip(np.asarray(oracle.normal(seed, *shape, times=50)), -128, 127).astype(jnp.dtype(dtype))
        for seed, shape in enumerate([(L, pool, K, R, C), (L, B, W, K, C)])
    )
    if jnp.issubdtype(dtype, jnp.floating):
        cache_LPKRC[:, :, :, ::2] = np.nan
        new_LBWKC[:, np.arange(W)[None, :] >= count_B[:, None]] = np.nan
    return tuple(map(jnp.asarray, (cache_LPKRC, new_LBWKC, np.array(positions, np.int32), count_B, page_BJ)))


def expected(cache, new, position_B, count_B, page_BJ, *, row_axis: int = 3):
    """Row by row."""
    pages, new, page_BJ = np.moveaxis(np.array(cache), row_axis, 2), np.asarray(new), np.asarray(page_BJ)
    rows = pages.shape[2]
    for b, position in enumerate(np.asarray(position_B).tolist()):
        for w, at in enumerate(range(position, position + int(count_B[b]))):
            if 0 <= at < page_BJ.shape[1] * rows:
                pages[:, page_BJ[b, at // rows], at % rows] = new[:, b, w]
    return np.moveaxis(pages, 2, row_axis)


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
@pytest.mark.parametrize(
    ("W", "K", "C", "dtype"),
    [
        (4, 1, 256, jnp.bfloat16),
        (7, 1, 128, jnp.int8),
        pytest.param(7, 3, 128, jnp.float32, marks=pytest.mark.slow),
        pytest.param(8, 2, 128, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(8, 3, 256, jnp.int8, marks=pytest.mark.slow),
        pytest.param(2, 1, 256, jnp.int8, marks=pytest.mark.slow),
    ],
)
def test_writes_the_rows_that_were_accepted(mesh, backend, W, K, C, dtype):
    """None, some or all of them, over borders of tiles and of pages, past the last page; a rejected one is NaN."""
    tile = tile_rows(dtype)
    positions = [3, 0, tile - 1, tile - W, R - 1, R - 2, 2 * R - 1, 2 * R, R - W, -1, 2 * tile - 3]
    counts = [0, W, W, W, 1, W - 1, W, W, W, 1, 2]
    args = inputs(3, K, C, dtype, positions, counts, W)
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
    scale_LPK2R, new_LBWK2 = oracle.normal(0, 2, pool, K, 2, rows), oracle.normal(1, 2, B, 1, K, 2)
    scale_LPK2R = jnp.where(jnp.arange(rows) % 2 == 0, jnp.nan, scale_LPK2R)
    args = (scale_LPK2R, new_LBWK2, array(positions), jnp.ones(B, jnp.int32), array(page_BJ))
    out = FLUSH(*args, row_axis=4, mesh=mesh, backend=backend)
    assert np.array_equal(oracle.bits(out), oracle.bits(expected(*args, row_axis=4)))


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
def test_scales_of_the_rows_that_were_accepted(mesh, backend):
    W, K, rows = 5, 3, 256
    positions, counts = [126, 0, 254, 256, 509, 512, 60, 3], [5, 2, 5, 1, 5, 2, 0, 4]
    page_BJ, pool = pages_of(len(positions))
    scale_LPK2R, new_LBWK2 = oracle.normal(0, 2, pool, K, 2, rows), oracle.normal(1, 2, len(positions), W, K, 2)
    is_stored_BW = jnp.arange(W)[None, :] < array(counts)[:, None]
    new_LBWK2 = jnp.where(is_stored_BW[None, :, :, None, None], new_LBWK2, jnp.nan)
    args = (scale_LPK2R, new_LBWK2, array(positions), array(counts), array(page_BJ))
    out = FLUSH(*args, row_axis=4, mesh=mesh, backend=backend)
    assert np.array_equal(oracle.bits(out), oracle.bits(expected(*args, row_axis=4)))


def test_several_layer_groups():
    """Layers in groups that the budget cuts: 6 layers, room for 4, so 3 a step. Two cores have 3 layers each."""
    layer_bytes = 4 * 8 * 128 * 4
    assert layer_group(6, 1, 128, jnp.float32, 4 * layer_bytes) == 3
    args = inputs(6, 1, 128, jnp.float32, [5, 2 * R, 127])
    for cores, vmem_bytes in ((1, 4 * layer_bytes), (2, VMEM_BYTES)):
        options = {"cores": cores, "interpret": interpret_params("pallas_interpret"), "vmem_bytes": vmem_bytes}
        out_LPKRC = jax.jit(functools.partial(cache_flush_tpu, row_axis=3, **options))(*args)
        assert np.array_equal(oracle.bits(out_LPKRC), oracle.bits(expected(*args)))


@pytest.mark.parametrize(
    ("tokens", "positions", "counts", "steps"),
    [  # a step: slot, its page, the page's tile, first and last new row counted from the tile
        (1, [9, 3, -1, 127], [0, 1, 1, 1], [(1, 0, 0, 3, 4), (3, 0, 15, 7, 8)]),
        (1, [256, 255, 128, 5], [1, 1, 1, 1], [(1, 1, 15, 7, 8), (2, 1, 0, 0, 1), (3, 0, 0, 5, 6)]),
        (4, [126, 8, 5, 254], [4, 4, 2, 4], [
            (0, 0, 15, 6, 10), (0, 1, 0, -2, 2), (1, 0, 1, 0, 4), (2, 0, 0, 5, 7), (3, 1, 15, 6, 10),
        ]),
        (8, [-3, 1, 0, 300], [5, 8, 0, 2], [(0, 0, 0, -3, 2), (1, 0, 0, 1, 9), (1, 0, 1, -7, 1)]),
        (3, [7, 7, 7, 7], [0, 0, 0, 0], []),
    ],
)  # fmt: skip
def test_a_step_for_each_tile_that_changes(tokens, positions, counts, steps):
    page_BJ = jnp.arange(8, dtype=jnp.int32).reshape(4, 2) + 40
    at = array(positions, jnp.int32), array(counts, jnp.int32)
    tiles = TILES(*at, page_BJ, tokens=tokens, tile=8, rows=R)
    assert int(tiles.count) == max(1, len(steps))
    listed = list(zip(*(values.tolist() for values in tiles[1:]), strict=True))
    assert listed[: len(steps)] == [(b, int(page_BJ[b, j]), *rest) for b, j, *rest in steps]
    assert set(listed[len(steps) :]) <= {(0, 0, 0, 0, 0)}, "what has nothing to write gives a tile back as it was"


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


@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "row_axis", "shape"),
    [(jnp.float32, 3, (8, 9, 3, R, 128)), (jnp.int8, 3, (8, 9, 3, R, 128)), (jnp.float32, 4, (8, 9, 3, 2, 8 * R))],
)
def test_xla_is_in_place(mesh, dtype, row_axis, shape, W):
    """A copy of the cache per step would cost more than the step."""
    cache, position_B, page_BJ = jnp.zeros(shape, dtype), array([0, 5, 99, 2 * R]), array(pages_of(4)[0])
    new = jnp.moveaxis(jnp.take(cache[:, :4], jnp.arange(W), axis=row_axis), row_axis, 2)
    flush = jax.jit(functools.partial(cache_flush, row_axis=row_axis, mesh=mesh, backend="xla"), donate_argnums=0)
    memory = memory_of(flush.lower(cache, new, position_B, jnp.full(4, W), page_BJ).compile())
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 20


def test_sharded_equals_one_device(mesh, mesh_of_8):
    args = inputs(2, 8, 128, jnp.float32, [0, 2 * R, 77])
    one, eight = FLUSH(*args, mesh=mesh, backend="xla"), FLUSH(*args, mesh=mesh_of_8, backend="xla")
    assert np.array_equal(oracle.bits(one), oracle.bits(eight))


@pytest.mark.parametrize(
    ("new_shape", "new_dtype", "page_shape", "message"),
    [
        ((2, 1, 4, 1, 64), jnp.float32, (1, 2), r"new must be \[L, B, W, K, C\] = \(2, 1, 4, 1, 128\)"),
        ((2, 1, 1, 128), jnp.float32, (1, 2), r"new must have 5 axes, .*, got \(2, 1, 1, 128\)"),
        ((2, 1, 1, 1, 128), jnp.bfloat16, (1, 2), "encode the new rows first"),
        ((2, 1, 9, 1, 128), jnp.float32, (1, 2), r"W=9 tokens per slot must be at most 8 on a TPU"),
        ((2, 1, 1, 1, 128), jnp.float32, (2, 2), r"page_BJ must be \[B, J\]"),
    ],
)
def test_refuses(mesh, new_shape, new_dtype, page_shape, message):
    cache_LPKRC, new_LBWKC = jnp.zeros((2, 3, 1, R, 128)), jnp.zeros(new_shape, new_dtype)
    page_BJ, one_B = jnp.zeros(page_shape, jnp.int32), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        cache_flush(cache_LPKRC, new_LBWKC, one_B, one_B, page_BJ, mesh=mesh, backend="pallas")
