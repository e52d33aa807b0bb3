"""Arrays by several threads are what they are by one."""

import threading

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from slipstream.engine_impl.checkpoints import by_rows
from slipstream.engine_impl.checkpoints.gguf_file import GGUFFile


@pytest.fixture(autouse=True)
def little_at_a_time(monkeypatch):
    monkeypatch.setattr(by_rows, "BYTES", 256)


@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (1000,), (37, 11), (3, 100, 7)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_copy_is_whole(shape, dtype):
    source = np.asarray(np.random.default_rng(0).normal(size=shape)).astype(ml_dtypes.bfloat16)
    copy = by_rows.copied(source, np.dtype(dtype))
    assert copy.dtype == dtype
    np.testing.assert_array_equal(copy, source.astype(dtype))
    assert not np.shares_memory(copy, source)


def test_a_copy_of_columns_is_whole():
    source = np.arange(70 * 90, dtype=np.float32).reshape(70, 90)
    np.testing.assert_array_equal(by_rows.copied(source.T[:, 5:50], np.dtype(np.float64)), source.T[:, 5:50])


def test_a_cpu_takes_a_copy_as_it_is():
    """Without a second one."""
    copy = by_rows.copied(np.ones((1000, 1000), ml_dtypes.bfloat16), np.dtype(np.float32))
    on_device = jax.device_put(copy)
    assert on_device.unsafe_buffer_pointer() == copy.ctypes.data
    np.testing.assert_array_equal(on_device, copy)


def test_a_stack_is_whole():
    sources = [np.full((9, 21), i, np.float32) for i in range(12)]
    np.testing.assert_array_equal(by_rows.stacked(sources, np.dtype(np.float16)), np.stack(sources))


@pytest.mark.filterwarnings("error")
def test_what_overflows_is_infinite_without_a_word():
    assert np.isinf(by_rows.copied(np.full((100, 9), 1e30, np.float32), np.dtype(np.float16))).all()


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn]
)
def test_one_value_that_is_not_finite_is_seen(dtype, monkeypatch):
    """Wherever it stands, of either sign; the largest values are finite."""
    monkeypatch.setattr(by_rows, "LOOKED_AT", 8)
    limits = ml_dtypes.finfo(dtype)
    values = np.random.default_rng(0).normal(size=(37, 11)).astype(dtype)
    values[3, :4] = limits.max, limits.min, 0, limits.smallest_subnormal
    assert by_rows.all_finite(values)
    for value in (np.nan, -np.nan, np.inf, -np.inf):  # an infinity is NaN in float8_e4m3fn
        for place in ((0, 0), (20, 7), (36, 10)):
            faulty = values.copy()
            faulty[place] = value
            assert not by_rows.all_finite(faulty)
            assert not by_rows.all_finite(faulty.T)
    assert not by_rows.all_finite(np.array(np.nan, dtype))
    assert by_rows.all_finite(np.zeros((0, 5), dtype))


def test_every_row_is_worked_on_once_and_by_several_threads():
    seen, together = [], threading.Barrier(2, timeout=30)

    def work(rows):
        seen.extend(range(100)[rows])
        if rows.start in (0, 25):
            together.wait()  # which one thread alone could not pass

    by_rows.by_rows(100, 1024, work)
    assert sorted(seen) == list(range(100))


def test_what_goes_wrong_in_a_thread_is_told():
    def work(rows):
        if rows.start:
            raise ValueError(rows)

    with pytest.raises(ValueError, match="slice"):
        by_rows.by_rows(100, 1024, work)


@pytest.mark.parametrize("shape", [(40, 64), (3, 5, 64)])
def test_blocks_are_decoded_as_the_package_does(shape, tmp_path):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    codes = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", codes, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType.Q4_0)
    file = GGUFFile(tmp_path / "m.gguf")
    np.testing.assert_array_equal(file.tensor("a"), expected)
    if len(shape) == 3:
        np.testing.assert_array_equal(file.tensor("a", 1), expected[1])
