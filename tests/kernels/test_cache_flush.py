import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.kernels import cache_flush
from slipstream.kernels.backend import interpret_params
from slipstream.kernels.cache_flush.pallas_tpu import VMEM_BYTES, cache_flush_tpu, layer_group, tile_rows

from . import oracle

S = 128
FLUSH = jax.jit(cache_flush, static_argnames=("token_axis", "mesh", "backend"))


def inputs(L, K, C, dtype, positions):
    """A cache with NaN in half of its rows, new rows, positions."""
    B = len(positions)
    cache_LBKSC = oracle.normal(0, L, B, K, S, C, dtype=jnp.float32) * 50
    if jnp.issubdtype(dtype, jnp.floating):
        cache_LBKSC = jnp.where(jnp.arange(S)[None, None, None, :, None] % 2 == 0, jnp.nan, cache_LBKSC)
    new_LBKC = oracle.normal(1, L, B, K, C, dtype=jnp.float32) * 50
    return cache_LBKSC.astype(dtype), new_LBKC.astype(dtype), jnp.array(positions, jnp.int32)


def expected(cache_LBKSC, new_LBKC, position_B):
    """Row by row."""
    cache_LBKSC = np.array(cache_LBKSC)
    for b, position in enumerate(position_B):
        if 0 <= position < S:
            cache_LBKSC[:, b, :, position] = new_LBKC[:, b]
    return cache_LBKSC


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
    """A dead slot (-1) or a full one (S) that wrote anywhere, or a tile's neighbour that changed, even a NaN's bits."""
    tile = tile_rows(dtype)
    args = inputs(3, K, C, dtype, [0, 1, tile - 1, tile, S - 1, S, -1, S + tile, -S])
    out_LBKSC = FLUSH(*args, mesh=mesh, backend=backend)
    assert np.array_equal(oracle.bits(out_LBKSC), oracle.bits(expected(*args)))


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
@pytest.mark.parametrize(
    ("K", "B"), [(1, 9), pytest.param(3, 9, marks=pytest.mark.slow), pytest.param(1, 130, marks=pytest.mark.slow)]
)
def test_scales_are_written_on_the_lanes(mesh, backend, K, B):
    """Tokens last: a lane's neighbours keep their bits, and a slot gets its own scales, the 129th too."""
    S, positions = 256, ([0, 1, 127, 128, 255, 256, -1, 300, -256] * 15)[:B]
    scale_LBK2S, new_LBK2 = oracle.normal(0, 2, B, K, 2, S), oracle.normal(1, 2, B, K, 2)
    scale_LBK2S = jnp.where(jnp.arange(S) % 2 == 0, jnp.nan, scale_LBK2S)
    out = FLUSH(scale_LBK2S, new_LBK2, jnp.array(positions), token_axis=4, mesh=mesh, backend=backend)
    expected_LBK2S = np.array(scale_LBK2S)
    for b, position in enumerate(positions):
        if 0 <= position < S:
            expected_LBK2S[:, b, :, :, position] = new_LBK2[:, b]
    assert np.array_equal(oracle.bits(out), oracle.bits(expected_LBK2S))


def test_several_layer_groups(mesh):
    """Layers in groups that the budget cuts: 6 layers, room for 4, so 3 a step."""
    layer_bytes = 4 * 8 * 128 * 4
    assert layer_group(6, 1, 128, jnp.float32, 4 * layer_bytes) == 3
    args = inputs(6, 1, 128, jnp.float32, [5, S, 127])
    out_LBKSC = cache_flush_tpu(
        *args, token_axis=3, interpret=interpret_params("pallas_interpret"), vmem_bytes=4 * layer_bytes
    )
    assert np.array_equal(oracle.bits(out_LBKSC), oracle.bits(expected(*args)))


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
    ("dtype", "token_axis", "shape"),
    [(jnp.float32, 3, (8, 4, 3, S, 128)), (jnp.int8, 3, (8, 4, 3, S, 128)), (jnp.float32, 4, (8, 4, 3, 2, 8 * S))],
)
def test_xla_is_in_place(mesh, dtype, token_axis, shape):
    """A copy of the cache per step would cost more than the step."""
    cache, position_B = jnp.zeros(shape, dtype), jnp.array([0, 5, 99, S])
    new = jnp.take(cache, 0, axis=token_axis)
    flush = jax.jit(functools.partial(cache_flush, token_axis=token_axis, mesh=mesh, backend="xla"), donate_argnums=0)
    memory = flush.lower(cache, new, position_B).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 20


def test_sharded_equals_one_device(mesh, mesh_of_8):
    args = inputs(2, 8, 128, jnp.float32, [0, S, 77])
    one, eight = FLUSH(*args, mesh=mesh, backend="xla"), FLUSH(*args, mesh=mesh_of_8, backend="xla")
    assert np.array_equal(oracle.bits(one), oracle.bits(eight))


@pytest.mark.parametrize(
    ("new_shape", "new_dtype", "message"),
    [
        ((2, 1, 1, 64), jnp.float32, r"new must be \[L, B, K, C\]"),
        ((2, 1, 1, 128), jnp.bfloat16, "encode the new rows first"),
    ],
)
def test_refuses(mesh, new_shape, new_dtype, message):
    cache_LBKSC, new_LBKC = jnp.zeros((2, 1, 1, S, 128)), jnp.zeros(new_shape, new_dtype)
    with pytest.raises(ValueError, match=message):
        cache_flush(cache_LBKSC, new_LBKC, jnp.zeros(1, jnp.int32), mesh=mesh, backend="xla")
