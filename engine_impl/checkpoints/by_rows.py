"""Large arrays by several threads, each a few rows at a time: numpy leaves the interpreter's lock meanwhile.

So a file is read at several places at once, and what is read is converted by all cores.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

THREADS = min(max(8, os.cpu_count() or 1), 32)
BYTES = 8 * 2**20
"""What a thread does at a time, of the result."""

LOOKED_AT = 2**17
"""Values that are looked at together: they stay in a core's cache."""

ALIGNED = 64
"""Where in memory an array has to begin that XLA's CPU takes as it is (bytes); it copies others."""


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As numpy's, so that a CPU device takes it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)


def copied(source: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of an array, or of a memory map, as `dtype`."""
    out = empty(source.shape, dtype)
    if source.ndim == 0:
        fill(out, source)
    else:
        by_rows(len(source), out.nbytes, lambda rows: fill(out[rows], source[rows]))
    return out


def stacked(sources: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Likewise of several of one shape, on a new first axis."""
    out = empty((len(sources), *sources[0].shape), dtype)

    def fill_some(which: slice) -> None:
        for one, source in zip(out[which], sources[which], strict=True):
            fill(one, source)

    by_rows(len(sources), out.nbytes, fill_some)
    return out


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, of any type of floats."""
    dtype = array.dtype
    bits = np.dtype(f"u{dtype.itemsize}")
    infinite = np.asarray(np.inf).astype(dtype).view(bits)  # or NaN, in a type that has no other: all of its exponent
    rows, found = array if array.ndim else array[None], []

    def look_at(which: slice) -> None:
        part = np.ascontiguousarray(rows[which]).reshape(-1).view(bits)
        some = (part[start : start + LOOKED_AT] for start in range(0, len(part), LOOKED_AT))
        found.append(all((one & infinite).max() < infinite for one in some))

    by_rows(len(rows), array.nbytes, look_at)
    return all(found)


def by_rows(rows: int, total_bytes: int, work: Callable[[slice], object]) -> None:
    """Calls `work` for slices that are all of `rows` together, whose results have `total_bytes`."""
    step = max(1, rows * BYTES // max(total_bytes, 1))
    slices = [slice(start, start + step) for start in range(0, rows, step)]
    if len(slices) <= 1:
        for all_rows in slices:
            work(all_rows)
        return
    for _ in _pool().map(work, slices):
        pass


def fill(out: np.ndarray, source: np.ndarray) -> None:
    """Copies values into `out`, as its type. What overflows becomes infinite: whoever loads weights tells of it."""
    with np.errstate(over="ignore"):
        out[...] = source


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "read")
