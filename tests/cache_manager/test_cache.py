"""The cache's layout, its codecs, and its two writers."""

from dataclasses import replace
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from slipstream.cache_manager import (
    KV,
    CacheLayout,
    Int8,
    Plain,
    codec_for,
    flush,
    insert,
    prompt_rows,
    rows,
    tuned_page_rows,
)

from tests.arrays import array
from tests.tpu import memory_of

LAYOUT = CacheLayout(
    layers=2, slots=3, kv_heads=2, length=256, head_dim=4, dtype=jnp.dtype("bfloat16"), page_rows=128, pages=6
)
INT8 = replace(LAYOUT, codec=Int8())
PAGES = np.array([[4, 0], [5, 2], [1, 3]], np.int32)  # of three slots
INSERT = jax.jit(insert)
FLUSH = jax.jit(flush, static_argnames=("codec", "mesh", "backend"))


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:1]), ("tensor",))


def noise(*shape, seed=0):
    return array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def int8_noise(layout, seed=0):
    """A cache of random codes and scales."""
    codes = np.random.default_rng(seed).integers(-127, 128, layout.shape)
    return KV(array(codes, jnp.int8), jnp.abs(noise(*layout.shape[:3], 2, layout.page_rows, seed=seed)))


def int8_prefix(bucket, seed=1):
    """A prompt's codes and scales."""
    codes = np.random.default_rng(seed).integers(-127, 128, (2, 2, bucket, 8))
    return KV(array(codes, jnp.int8), jnp.abs(noise(2, 2, 2, bucket, seed=seed)))


def meant(kv):
    """What stored tokens stand for, in float64."""
    rows_SC, scales_2S = np.asarray(kv.rows, np.float64), np.asarray(kv.scales, np.float64)
    return rows_SC * np.repeat(scales_2S.swapaxes(-1, -2), rows_SC.shape[-1] // 2, axis=-1)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_shape_and_bytes():
    assert LAYOUT.shape == (2, 6, 2, 128, 8)
    assert LAYOUT.bytes == 2 * 6 * 2 * 128 * 8 * 2
    assert INT8.bytes == 2 * 6 * 2 * 128 * (8 + 8)  # codes, and two f32 scales


def test_pages_for_tokens():
    assert [LAYOUT.pages_for(tokens) for tokens in (0, 1, 128, 129, 256)] == [0, 1, 1, 2, 2]
    assert (LAYOUT.pages_per_slot, LAYOUT.table_entries) == (2, 6)
    assert replace(LAYOUT, slots=512, length=32768).table_entries == 16384


@pytest.mark.parametrize(
    ("kv_heads", "length", "codec", "backend", "rows"),
    [
        (2, 4096, Plain(), "xla", 128),
        (2, 4096, Int8(), "xla_gpu", 128),
        (8, 4096, Plain(), "pallas", 128),
        (1, 4096, Plain(), "pallas", 1024),
        (1, 4096, Int8(), "pallas", 1024),
        (1, 384, Plain(), "pallas", 128),
    ],
)
def test_page_rows_of_a_chip_that_was_not_tuned(mesh, kv_heads, length, codec, backend, rows):
    """By the bytes of a chip's heads; pages of 128 rows where no kernel reads them."""
    sizes = {"kv_heads": kv_heads, "head_dim": 128, "length": length, "dtype": jnp.dtype("bfloat16"), "codec": codec}
    assert tuned_page_rows(**sizes, mesh=mesh, backend=backend) == rows


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 64), ("bfloat16", 128)])
@pytest.mark.parametrize("codec", [Plain(), Int8()])
def test_pages_are_smaller_where_the_cpus_own_kernels_read_them(mesh, codec, dtype, rows):
    """They read float32 and its codes; XLA reads bfloat16."""
    sizes = {"kv_heads": 3, "head_dim": 64, "length": 384, "dtype": jnp.dtype(dtype), "codec": codec}
    assert tuned_page_rows(**sizes, mesh=mesh, backend="native_cpu") == rows


def test_codecs_by_name():
    assert [codec_for(name) for name in ("none", "int8")] == [Plain(), Int8()]


@pytest.mark.parametrize("layout", [LAYOUT, INT8], ids=["plain", "int8"])
def test_a_device_holds_its_heads(layout):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(layout.abstract(mesh))]
    assert shards == [(2, 6, 1, 128, 8), (2, 6, 1, 2, 128)][: len(shards)]
    empty = layout.empty()
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(empty)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(layout.abstract(mesh))
    ]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(empty)) == layout.bytes


def test_a_row_is_k_then_v():
    k, v = noise(3, 2, 4), noise(3, 2, 4, seed=1)
    row = rows(k, v)
    np.testing.assert_array_equal(row[..., :4], k)
    np.testing.assert_array_equal(row[..., 4:], v)


def hard_rows():
    """[5, 6, 2 * 16]: normal, an outlier channel, zeros, tiny and huge values, one value alone."""
    x = np.array(noise(5, 6, 32))
    x[0, :, 3] *= 1000
    x[1, :, 16:] = 0
    x[2] *= 1e-39
    x[3] *= 1e36
    x[4] = 0
    x[4, :, 7] = np.arange(6) - 3
    return x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_is_off_by_half_a_scale_at_most(dtype):
    """Against float64; k and v do not share a scale, so an outlier in k does v no harm."""
    x = array(hard_rows(), dtype)
    kv = jax.jit(Int8().encode)(x)
    assert (kv.rows.dtype, kv.scales.dtype, kv.scales.shape) == (jnp.int8, jnp.float32, (5, 6, 2))
    exact = np.asarray(x, np.float64).reshape(5, 6, 2, 16)
    scale = np.asarray(kv.scales, np.float64)[..., None]
    error = np.abs(np.asarray(kv.rows, np.float64).reshape(exact.shape) * scale - exact)
    assert (error <= scale * 0.5001).all()
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(scale, np.maximum(largest / 127, np.finfo(np.float32).tiny), rtol=1e-6)
    assert error[4].max() <= 1e-6 * 3, "one value alone, or none, is exact"


def test_one_value_a_head():
    """Head dim 1: every code is 127, -127 or 0, and the value comes back."""
    x = array([[3.0, -0.5], [0.0, 1e30], [-7.0, 0.0]])
    kv = Int8().encode(x)
    assert kv.rows.tolist() == [[127, -127], [0, 127], [-127, 0]]
    np.testing.assert_allclose(np.asarray(kv.rows, np.float32) * np.asarray(kv.scales), x, rtol=1e-6)


def test_plain_keeps_rows():
    x = noise(3, 8)
    kv = Plain().encode(x)
    assert kv.rows is x
    assert kv.scales is None


def test_a_prompts_rows_are_encoded_token_by_token():
    """Scales stand with the tokens last, and belong to their token and head."""
    k, v = noise(5, 2, 4) * 3, noise(5, 2, 4, seed=1)
    plain, int8 = prompt_rows(k, v, Plain()), prompt_rows(k, v, Int8())
    assert int8.scales is not None
    assert (int8.rows.shape, int8.scales.shape) == ((2, 5, 8), (2, 2, 5))
    np.testing.assert_array_equal(plain.rows, np.asarray(rows(k, v)).swapaxes(0, 1))
    np.testing.assert_allclose(meant(int8), plain.rows, atol=np.abs(k).max() / 127 * 0.51)
    np.testing.assert_allclose(meant(int8)[..., 4:], plain.rows[..., 4:], atol=np.abs(v).max() / 127 * 0.51)


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize(
    ("bucket", "start", "count"),
    [
        (16, 0, 1), (16, 0, 16), (16, 128, 16), (128, 0, 128), (128, 128, 128), (256, 0, 100), (256, 0, 129),
        (256, 0, 256), (256, 128, 100), (192, 0, 192), (64, 0, 0),
    ],
)  # fmt: skip
def test_insert_is_left_aligned_and_touches_the_texts_pages(slot, bucket, start, count):
    """Row by row over the text's pages from its start on; padding may come along into the last page, and no further."""
    cache, texts = int8_noise(INT8), int8_prefix(bucket)
    assert texts.scales is not None
    expected = jax.tree.map(np.array, cache)
    copy_text(expected, texts, slot, 0, bucket, start, count)
    args = array(PAGES[slot : slot + 1]), array([start]), array([count])
    assert_same(INSERT(cache, texts, *args), expected)
    assert_same(INSERT(KV(cache.rows), KV(texts.rows), *args), KV(expected.rows))


def copy_text(expected, texts, slot, first, bucket, start, count):
    """As `insert` is to do it with the rows of one text, which stand from `first` on: in parts of a page or less."""
    part = gcd(bucket, 128)
    for row in range(-(-count // part) * part):
        page, at = PAGES[slot, (start + row) // 128], (start + row) % 128
        expected.rows[:, page, :, at] = texts.rows[:, :, first + row]
        expected.scales[:, page, :, :, at] = texts.scales[:, :, :, first + row]


def test_insert_of_several_texts():
    """Each from its own start; one is padding, and has no pages."""
    cache, texts = int8_noise(INT8), int8_prefix(4 * 64)
    expected = jax.tree.map(np.array, cache)
    places = [(2, 128, 64), (0, 0, 5), (0, 0, 0), (1, 128, 1)]
    for n, (slot, start, count) in enumerate(places):
        copy_text(expected, texts, slot, n * 64, 64, start, count)
    slot_N, start_N, count_N = (np.array(column) for column in zip(*places, strict=True))
    assert_same(INSERT(cache, texts, PAGES[slot_N], start_N, count_N), expected)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("codec", [Plain(), Int8()])
def test_insert_is_in_place(codec, count):
    layout = replace(LAYOUT, layers=8, slots=16, pages=32, dtype=jnp.dtype("float32"), codec=codec)
    cache = layout.empty()
    texts = jax.tree.map(lambda leaf: leaf[:, 0], cache)  # of one page
    args = cache, texts, jnp.zeros((count, 2), jnp.int32), jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32)
    memory = memory_of(jax.jit(insert, donate_argnums=0).lower(*args).compile())
    assert memory.alias_size_in_bytes == layout.bytes
    assert memory.temp_size_in_bytes < layout.bytes / 10


LENGTHS, COUNTS = array([0, 5, 127]), array([1, 0, 2])
WRITTEN = ((0, 0, 4, 0), (2, 0, 1, 127), (2, 1, 3, 0))  # slot, of its tokens, page, row


def test_flush_writes_accepted_tokens_behind_the_last_row(mesh):
    """A dead slot keeps its row 5, though its stale length says 5; a rejected token is NaN, and nowhere."""
    cache, new = noise(*LAYOUT.shape), noise(2, 3, 2, 2, 8, seed=1)
    expected = np.array(cache)
    for slot, token, page, row in WRITTEN:
        expected[:, page, :, row] = np.asarray(new)[:, slot, token]
    new = new.at[:, 0, 1].set(jnp.nan)
    flushed = FLUSH(KV(cache), new, LENGTHS, COUNTS, array(PAGES), codec=Plain(), mesh=mesh, backend="xla")
    assert_same(flushed, KV(array(expected)))
    full = array([256, 256, 256])
    flushed = FLUSH(KV(cache), new, full, COUNTS, array(PAGES), codec=Plain(), mesh=mesh, backend="xla")
    assert_same(flushed, KV(cache))


def test_flush_encodes_and_leaves_all_else_as_it_is(mesh):
    """Poison: scales of all other tokens are NaN, and stay so."""
    cache, new = int8_noise(INT8), noise(2, 3, 2, 2, 8, seed=1)
    assert cache.scales is not None
    cache = cache._replace(scales=jnp.full_like(cache.scales, jnp.nan))
    expected, encoded = jax.tree.map(np.array, (cache, jax.jit(Int8().encode)(new)))
    for slot, token, page, row in WRITTEN:
        expected.rows[:, page, :, row] = encoded.rows[:, slot, token]
        expected.scales[:, page, :, :, row] = encoded.scales[:, slot, token]
    flushed = FLUSH(cache, new, LENGTHS, COUNTS, array(PAGES), codec=Int8(), mesh=mesh, backend="xla")
    assert_same(flushed, expected)
