"""How many rows a page of the cache has: what one step of the TPU kernel reads, and the unit that a pool is shared in.

The tuned sizes are data, a file for each kind of device in `page_sizes/`, written by

    python -m slipstream.benchmarks.compiler.kernel_report --write

from the compiler's schedule, not from a clock (page_sizes.md).
"""

import functools
import json
import logging
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

FOLDER = Path(__file__).parent / "page_sizes"
ROWS_WITHOUT_KERNEL = 128
"""On GPUs, and on CPUs where XLA reads the pages. Of 128 and 256 rows the first is the faster on CPUs up to 600 live
tokens, and as fast at 960."""
NATIVE_ROWS = 64
"""Where the CPU's own kernels read the pages: less of a prompt behind a cached prefix is computed again, and a head's
page stays in the nearest cache while the queries of several slots pass over it (benchmarks/README.md)."""
TARGET_BYTES = 512 * 1024
"""What most tuned pages come to: HBM takes 960 cycles of v5e for it, 560 of v6e; a step issues 500 bundles."""

log = logging.getLogger(__name__)


def page_rows(
    num_kv_heads: int,
    head_dim: int,
    cache_length: int,
    dtype: DTypeLike,
    device_kind: str | None,
    *,
    is_native: bool = False,
) -> int:
    """Rows of a page: the tuned size, else the power of two times 128 whose page comes nearest below TARGET_BYTES.

    Always divides `cache_length`, a multiple of 128, so that a slot's pages hold no more than its longest request;
    at least 128, or NATIVE_ROWS, and at most 2048.

    Args:
        num_kv_heads: kv heads that one chip holds; a page has the rows of all of them.
        head_dim: H; a row is k and v, 2 H values.
        dtype: of the cache's rows.
        device_kind: JAX's name of a TPU ("TPU v5 lite"); None where no kernel of ours reads the pages, or the CPU's.
        is_native: whether the CPU's do.
    """
    rows = NATIVE_ROWS if is_native else ROWS_WITHOUT_KERNEL
    if device_kind is not None:
        dtype = jnp.dtype(dtype)
        tuned = tuned_rows(device_kind)
        rows = tuned.get(shape_key(num_kv_heads, head_dim, dtype.name), 0)
        if not rows:
            rows = _untuned(num_kv_heads, head_dim, dtype, device_kind)
    while cache_length % rows:
        rows //= 2
    return rows


@functools.cache
def tuned_rows(device_kind: str) -> dict[str, int]:
    """Rows by `shape_key`; empty for a kind of device that was not tuned."""
    path = path_of(device_kind)
    return json.loads(path.read_text()) if path.exists() else {}


def shape_key(num_kv_heads: int, head_dim: int, dtype: str) -> str:
    """What a tuned size is for: "1 x 128 bfloat16", kv heads per chip, H and the type of the rows."""
    return f"{num_kv_heads} x {head_dim} {dtype}"


def path_of(device_kind: str) -> Path:
    """The file of a kind of device."""
    return FOLDER / f"{device_kind.lower().replace(' ', '_')}.json"


@functools.cache
def _untuned(num_kv_heads: int, head_dim: int, dtype: jnp.dtype, device_kind: str) -> int:
    row_bytes = num_kv_heads * max(2 * head_dim, 128) * dtype.itemsize
    rows = 1024
    while rows > 128 and rows * row_bytes > TARGET_BYTES:
        rows //= 2
    shape = shape_key(num_kv_heads, head_dim, dtype.name)
    log.info("no tuned page size for %s on %s, pages have %d rows", shape, device_kind, rows)
    return rows
