"""How many rows of a slot one step of the TPU kernel reads."""

import jax.numpy as jnp
from jax.typing import DTypeLike

LANES = 128

# (kv heads per chip, H, dtype) -> rows. Measured exceptions to the rule of `block_size`; none so far.
TUNED: dict[tuple[int, int, str], int] = {}

# A step costs about 250 cycles of v5e before it computes anything, and 256 KiB take 480 cycles to arrive from HBM:
# smaller blocks are bound by the former, larger ones read more of what a slot does not use.
TARGET_BYTES = 256 * 1024


def block_size(num_kv_heads: int, head_dim: int, cache_len: int, dtype: DTypeLike) -> int:
    """Rows per step: the tuned value, else the power of two times 128 whose block comes nearest below TARGET_BYTES.

    Always divides `cache_len`, a multiple of 128; at least 128 rows and at most 1024.

    Args:
        num_kv_heads: kv heads that one chip holds; a block has the rows of all of them.
        head_dim: H; a row is k and v, 2 H values.
    """
    dtype = jnp.dtype(dtype)
    tuned = TUNED.get((num_kv_heads, head_dim, dtype.name))
    if tuned is not None and cache_len % tuned == 0:
        return tuned
    row_bytes = num_kv_heads * max(2 * head_dim, LANES) * dtype.itemsize
    rows = 1024
    while rows > 128 and (rows * row_bytes > TARGET_BYTES or cache_len % rows):
        rows //= 2
    return rows
