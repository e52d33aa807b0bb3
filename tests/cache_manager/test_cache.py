"""The cache's layout, and its two writers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from slipstream.cache_manager import CacheLayout, flush, insert, rows

LAYOUT = CacheLayout(layers=2, slots=3, kv_heads=2, length=128, head_dim=4, dtype=jnp.dtype("bfloat16"))


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:1]), ("tensor",))


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_shape_and_bytes():
    assert LAYOUT.shape == (2, 3, 2, 128, 8)
    assert LAYOUT.bytes == 2 * 3 * 2 * 128 * 8 * 2


def test_a_device_holds_its_heads():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    assert LAYOUT.abstract(mesh).sharding.shard_shape(LAYOUT.shape) == (2, 3, 1, 128, 8)


def test_a_row_is_k_then_v():
    k, v = noise(3, 2, 4), noise(3, 2, 4, seed=1)
    row = rows(k, v)
    np.testing.assert_array_equal(row[..., :4], k)
    np.testing.assert_array_equal(row[..., 4:], v)


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("bucket", [16, 128])
def test_insert_is_left_aligned_and_touches_one_slot(slot, bucket):
    cache = noise(*LAYOUT.shape)
    prefix = noise(2, 2, bucket, 8, seed=1)
    expected = np.array(cache)
    expected[:, slot, :, :bucket] = prefix
    np.testing.assert_array_equal(insert(cache, prefix, jnp.int32(slot)), expected)


def test_insert_refuses_a_bucket_longer_than_the_cache():
    with pytest.raises(ValueError, match="bucket=256 does not fit into cache_length=128"):
        insert(jnp.zeros(LAYOUT.shape), jnp.zeros((2, 2, 256, 8)), jnp.int32(0))


def test_flush_writes_live_slots_behind_their_last_row(mesh):
    """A dead slot keeps its row 5, though its stale length says 5."""
    cache, new = noise(*LAYOUT.shape), noise(2, 3, 2, 8, seed=1)
    length, live = jnp.array([0, 5, 127]), jnp.array([True, False, True])
    expected = np.array(cache)
    expected[:, 0, :, 0] = new[:, 0]
    expected[:, 2, :, 127] = new[:, 2]
    flushed = flush(cache, new, length, live, mesh=mesh, backend="xla")
    np.testing.assert_array_equal(flushed, expected)
