"""How a layer's window reaches the kernels, and heads that the cache pads."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.cache_manager import KV, Plain
from slipstream.engine_impl.attention import attend_cache, attend_chunk, stored_head_dim
from slipstream.engine_impl.weights.sharding import make_mesh

from tests.arrays import array

LENGTHS, H = [0, 3, 70, 128], 6
PAGES = np.array([[2], [0], [3], [1]], np.int32)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(jax.devices(), 4, 2, 1)


def random(*shape):
    return array(np.random.default_rng(shape).normal(size=shape).astype(np.float32))


def wide(x, head_dim):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, head_dim - x.shape[-1])])


@pytest.mark.parametrize(("head_dim", "stored"), [(64, 64), (96, 128), (128, 128), (80, 128), (256, 256)])
def test_tpu_rows_are_whole_tiles(head_dim, stored):
    assert stored_head_dim(head_dim, "pallas") == stored
    assert stored_head_dim(head_dim, "xla") == head_dim


def test_padded_heads_change_nothing(mesh):
    """Neither what the model gets back nor, but for zeros, what is stored."""
    q, k, v = random(4, 4, H), random(4, 2, H), random(4, 2, H)
    pages = array(PAGES)
    cached_k, cached_v = random(1, 4, 2, 128, H), random(1, 4, 2, 128, H)
    outs, stored = [], []
    for width in (H, 16):
        cache = jnp.concatenate([wide(cached_k, width), wide(cached_v, width)], axis=-1)
        attend = attend_cache(KV(cache), array(LENGTHS), pages, soft_cap=2.0, mesh=mesh, backend="xla")
        start_N = array([0, 128])
        prompt = attend_chunk(KV(cache), start_N, pages[:2], codec=Plain(), soft_cap=2.0, mesh=mesh, backend="xla")
        outs.append(tuple(jax.jit(one.call, static_argnums=(0, 1))(0, 0, q, k, v) for one in (attend, prompt)))
        stored.append((attend.stored(k, v), cast(KV, prompt.stored(k, v)).rows))
    for plain, padded in zip(*outs, strict=True):
        np.testing.assert_allclose(padded, plain, rtol=1e-5, atol=1e-6)
    for plain, padded in zip(*stored, strict=True):
        halves = jnp.split(padded, 2, axis=-1)
        np.testing.assert_array_equal(jnp.concatenate([half[..., :H] for half in halves], axis=-1), plain)
        assert not any(half[..., H:].any() for half in halves)


@pytest.mark.parametrize("what", ["cache", "prompt"])
def test_a_traced_kind_sees_what_a_known_one_sees(mesh, what):
    """Layers under a scan select among windows; those that cut nothing off are one kind."""
    windows = {"window_of_layer": (5, None, 40, 4000), "mesh": mesh, "backend": "xla"}
    if what == "cache":
        attend = attend_cache(KV(random(4, 4, 2, 128, 2 * H)), array(LENGTHS), array(PAGES), **windows)
        qkv = random(4, 4, H), random(4, 2, H), random(4, 2, H)
    else:
        attend = attend_chunk(KV(random(4, 4, 2, 128, 2 * H)), array([128]), array([[2, 3]]), codec=Plain(), **windows)
        qkv = random(64, 4, H), random(64, 2, H), random(64, 2, H)
    assert attend.kind_of_layer == (0, 1, 2, 1)
    traced, known_kind = jax.jit(attend.call), jax.jit(attend.call, static_argnums=1)
    outs = []
    for kind in range(3):
        known = known_kind(jnp.int32(0), kind, *qkv)
        np.testing.assert_allclose(traced(jnp.int32(0), jnp.int32(kind), *qkv), known, rtol=1e-5, atol=1e-6)
        outs.append(np.asarray(known))
    assert all(np.abs(outs[i] - outs[j]).max() > 1e-2 for i, j in [(0, 1), (0, 2), (1, 2)])
