"""The kernels under the real TPU compiler: they fit the chip, and the cache is never copied."""

import functools

import jax
import jax.numpy as jnp
import pytest
from slipstream.cache_manager.codec import Int8
from slipstream.kernels import cache_flush, prefill_attention, ragged_attention

from ..tpu import abstract, compile_for, layer_sized_copies, nbytes, tpu_mesh

L, B, S = 4, 96, 4096
CASES = [  # kv heads a chip, group, H, dtype
    (1, 4, 128, jnp.bfloat16),
    (4, 1, 128, jnp.bfloat16),
    (4, 2, 128, jnp.bfloat16),
    (1, 8, 64, jnp.bfloat16),
    (4, 3, 64, jnp.bfloat16),
    (3, 3, 64, jnp.float32),
]
CHIPS = pytest.mark.parametrize("chips", [1, pytest.param(8, marks=pytest.mark.slow)])


def quick(*chosen):
    """CASES, those at other places slow."""
    return [case if i in chosen else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(CASES)]


# Each case's two kernels are compiled together in `test_step`, but for the one without groups.
HEADS = pytest.mark.parametrize(("K", "G", "H", "dtype"), quick(1, 5))


def arrays(mesh, K, G, H, dtype):
    """q, new (of a step), cache, layer, length; K is per chip."""
    K *= mesh.size
    return (
        abstract(mesh, (B, K * G, H), dtype, None, "tensor"),
        abstract(mesh, (L, B, K, 2 * H), dtype, None, None, "tensor"),
        abstract(mesh, (L, B, K, S, 2 * H), dtype, None, None, "tensor"),
        abstract(mesh, (), jnp.int32),
        abstract(mesh, (B,), jnp.int32),
    )


def assert_no_copy_of(cache_LBKSC, compiled):
    assert compiled.memory_analysis().temp_size_in_bytes < nbytes(cache_LBKSC) / 20
    assert layer_sized_copies(compiled, cache_LBKSC) == []


@CHIPS
@HEADS
def test_ragged_attention(chips, K, G, H, dtype):
    mesh = tpu_mesh(chips=chips)
    q_BNH, new_LBKC, cache_LBKSC, layer, length_B = arrays(mesh, K, G, H, dtype)

    def attend(q_BNH, new_LBKC, cache_LBKSC, layer, length_B):
        return ragged_attention(q_BNH, new_LBKC[0], cache_LBKSC, layer, length_B, mesh=mesh, backend="pallas")

    compiled = compile_for(mesh, attend, q_BNH, new_LBKC, cache_LBKSC, layer, length_B)
    assert_no_copy_of(cache_LBKSC, compiled)


@CHIPS
@HEADS
def test_cache_flush(chips, K, G, H, dtype):
    mesh = tpu_mesh(chips=chips)
    _, new_LBKC, cache_LBKSC, _, position_B = arrays(mesh, K, G, H, dtype)
    flush = functools.partial(cache_flush, mesh=mesh, backend="pallas")
    compiled = compile_for(mesh, flush, cache_LBKSC, new_LBKC, position_B, donate=(0,))
    assert_no_copy_of(cache_LBKSC, compiled)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes(cache_LBKSC)


def decode_step(mesh, flush, weight_LDD, token_BD, cache_LBKSC, length_B):
    """A step's shape: every layer reads the cache and returns its new row; one flush at the end."""
    K, C = cache_LBKSC.shape[2], cache_LBKSC.shape[4]

    def layer(x_BD, weight_and_layer):
        weight_DD, layer = weight_and_layer
        y_BD = x_BD @ weight_DD
        q_BNH = y_BD.reshape(B, -1, C // 2)
        new_BKC = y_BD[:, : K * C].reshape(B, K, C)
        out_BNH = ragged_attention(q_BNH, new_BKC, cache_LBKSC, layer, length_B, mesh=mesh, backend="pallas")
        return x_BD + out_BNH.reshape(B, -1), new_BKC

    token_BD, new_LBKC = jax.lax.scan(layer, token_BD, (weight_LDD, jnp.arange(L)))
    return token_BD, flush(cache_LBKSC, new_LBKC, length_B)


def compile_step(chips, K, G, H, dtype, flush_of):
    mesh = tpu_mesh(chips=chips)
    cache_LBKSC, length_B = arrays(mesh, K, G, H, dtype)[2::2]
    D = max(K * G * H, 2 * K * H) * mesh.size
    weight_LDD = abstract(mesh, (L, D, D), dtype, None, None, "tensor")
    step = functools.partial(decode_step, mesh, flush_of(mesh))
    token_BD = abstract(mesh, (B, D), dtype)
    return cache_LBKSC, compile_for(mesh, step, weight_LDD, token_BD, cache_LBKSC, length_B, donate=(2,))


@CHIPS
@pytest.mark.parametrize(("K", "G", "H", "dtype"), [case for i, case in enumerate(quick(2, 3, 5)) if i != 1])
def test_step(chips, K, G, H, dtype):
    """Layouts are chosen per module: kernels that are clean alone may disagree about the cache's inside a step."""

    def flush_of(mesh):
        return functools.partial(cache_flush, mesh=mesh, backend="pallas")

    cache_LBKSC, compiled = compile_step(chips, K, G, H, dtype, flush_of)
    assert_no_copy_of(cache_LBKSC, compiled)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes(cache_LBKSC)


def test_the_gate_sees_copies():
    """Guards the gate itself: a flush by vmapped update-slices wants another layout than the kernel."""

    def flush_of(mesh):
        del mesh

        def write(slot_LKSC, new_LKC, position):
            return jax.lax.dynamic_update_slice(slot_LKSC, new_LKC[:, :, None], (0, 0, position, 0))

        return jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)

    cache_LBKSC, compiled = compile_step(1, 4, 2, 128, jnp.bfloat16, flush_of)
    assert layer_sized_copies(compiled, cache_LBKSC)


@pytest.mark.parametrize(
    "topology", [pytest.param(t, marks=pytest.mark.slow) for t in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2")]
)
def test_other_chips(topology):
    mesh = tpu_mesh(topology, chips=1)
    for K, G, H, dtype in CASES:
        q_BNH, new_LBKC, cache_LBKSC, layer, length_B = arrays(mesh, K, G, H, dtype)
        new_BKC = abstract(mesh, new_LBKC.shape[1:], dtype)
        attend = functools.partial(ragged_attention, mesh=mesh, backend="pallas")
        compile_for(mesh, attend, q_BNH, new_BKC, cache_LBKSC, layer, length_B)
        flush = functools.partial(cache_flush, mesh=mesh, backend="pallas")
        compile_for(mesh, flush, cache_LBKSC, new_LBKC, length_B, donate=(0,))


@pytest.mark.parametrize(
    ("topology", "chips", "K", "G", "H"),
    [
        ("v5e:2x4", 1, 4, 3, 64),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("v5e:2x4", 1, 1, 4, 128),
                ("v5e:2x4", 1, 1, 8, 64),
                ("v5e:2x4", 8, 4, 2, 128),
                ("v5p:2x2x1", 1, 4, 3, 64),
                ("v6e:2x2", 1, 4, 2, 128),
                ("v4:2x2x1", 1, 1, 4, 128),
            ]
        ),
    ],
)
def test_int8(topology, chips, K, G, H):
    """Codes and scales: neither is copied, and the scales take the 8 bytes a token that they should."""
    mesh = tpu_mesh(topology, chips=chips)
    q_BNH, new_LBKC, _, layer, length_B = arrays(mesh, K, G, H, jnp.bfloat16)
    code_LBKSC = abstract(mesh, (L, B, K * chips, S, 2 * H), jnp.int8, None, None, "tensor")
    scale_LBK2S = abstract(mesh, (L, B, K * chips, 2, S), jnp.float32, None, None, "tensor")

    def step(q_BNH, new_LBKC, code_LBKSC, scale_LBK2S, layer, length_B):
        args = (q_BNH, new_LBKC[0], code_LBKSC, layer, length_B)
        out_BNH = ragged_attention(*args, scale_LBK2S=scale_LBK2S, mesh=mesh, backend="pallas")
        new = Int8().encode(new_LBKC + out_BNH[0, 0, 0])  # the flush comes after the attention
        code_LBKSC = cache_flush(code_LBKSC, new.rows, length_B, mesh=mesh, backend="pallas")
        scale_LBK2S = cache_flush(scale_LBK2S, new.scales, length_B, token_axis=4, mesh=mesh, backend="pallas")
        return code_LBKSC, scale_LBK2S, out_BNH

    compiled = compile_for(mesh, step, q_BNH, new_LBKC, code_LBKSC, scale_LBK2S, layer, length_B, donate=(2, 3))
    assert_no_copy_of(code_LBKSC, compiled)
    assert layer_sized_copies(compiled, scale_LBK2S) == []
    cache_bytes = nbytes(code_LBKSC) + nbytes(scale_LBK2S)
    assert cache_bytes == L * B * K * S * (2 * H + 8)
    assert compiled.memory_analysis().alias_size_in_bytes == cache_bytes


@pytest.mark.parametrize(
    "topology", ["v5e:2x4", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5p:2x2x1", "v6e:2x2"))]
)
@pytest.mark.parametrize(("K", "G", "H", "dtype"), [CASES[2], CASES[3]])
def test_window_and_soft_cap(topology, K, G, H, dtype):
    """A window that is known at run time only, as under a scan over layers of two kinds."""
    mesh = tpu_mesh(topology, chips=1)
    q_BNH, new_LBKC, cache_LBKSC, layer, length_B = arrays(mesh, K, G, H, dtype)

    def attend(q_BNH, new_LBKC, cache_LBKSC, layer, length_B, window):
        args = (q_BNH, new_LBKC[0], cache_LBKSC, layer, length_B)
        return ragged_attention(*args, window=window, soft_cap=50.0, mesh=mesh, backend="pallas")

    compiled = compile_for(mesh, attend, q_BNH, new_LBKC, cache_LBKSC, layer, length_B, layer)
    assert_no_copy_of(cache_LBKSC, compiled)
    q_TNH, k_TKH, v_TKH = (abstract(mesh, (1024, heads, H), dtype) for heads in (K * G, K, K))
    prompt = functools.partial(prefill_attention, window=300, soft_cap=50.0, mesh=mesh, backend="pallas")
    assert "tpu_custom_call" in compile_for(mesh, prompt, q_TNH, k_TKH, v_TKH).as_text()


@pytest.mark.parametrize("T", [16, 128, 1024])
@pytest.mark.parametrize(
    ("chips", "N", "K", "H", "dtype"),
    [
        (1, 9, 3, 64, jnp.bfloat16),
        (8, 32, 8, 128, jnp.bfloat16),
        pytest.param(1, 9, 3, 64, jnp.float32, marks=pytest.mark.slow),
        pytest.param(8, 64, 8, 64, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_prefill_attention(T, chips, N, K, H, dtype):
    mesh = tpu_mesh(chips=chips)
    q_TNH, k_TKH, v_TKH = (abstract(mesh, (T, heads, H), dtype, None, "tensor") for heads in (N, K, K))
    attend = functools.partial(prefill_attention, mesh=mesh, backend="pallas")
    compiled = compile_for(mesh, attend, q_TNH, k_TKH, v_TKH)
    assert "tpu_custom_call" in compiled.as_text()
