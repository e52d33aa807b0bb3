"""How many rows of a slot one step of the TPU kernel reads."""

import jax.numpy as jnp
from jax.typing import DTypeLike

LANES = 128

# (kv heads per chip, H, dtype) -> rows: of all blocks the one that loses least on the chip where it loses most, of v4,
# v5e, v5p and v6e. From the compiler's schedule, not from a clock: see block_sizes.md, also for how to make it anew.
TUNED: dict[tuple[int, int, str], int] = {
    (1, 64, "bfloat16"): 1024,
    (1, 128, "bfloat16"): 512,
    (4, 64, "bfloat16"): 512,
    (4, 128, "bfloat16"): 256,
    (8, 64, "bfloat16"): 256,
    (8, 128, "bfloat16"): 256,
    (1, 64, "float32"): 512,
    (1, 128, "float32"): 512,
    (4, 64, "float32"): 256,
    (4, 128, "float32"): 256,
    (8, 64, "float32"): 256,
    (8, 128, "float32"): 256,
    (1, 64, "int8"): 1024,
    (1, 128, "int8"): 1024,
    (4, 64, "int8"): 512,
    (4, 128, "int8"): 512,
    (8, 64, "int8"): 512,
    (8, 128, "int8"): 512,
}

# What most of the above come to. HBM takes 960 cycles of v5e for it, 560 of v6e; a step issues 500 bundles.
TARGET_BYTES = 512 * 1024


def block_size(num_kv_heads: int, head_dim: int, cache_len: int, dtype: DTypeLike) -> int:
    """Rows per step: the tuned value, else the power of two times 128 whose block comes nearest below TARGET_BYTES.

    Always divides `cache_len`, a multiple of 128; at least 128 rows and at most 1024.

    Args:
        num_kv_heads: kv heads that one chip holds; a block has the rows of all of them.
        head_dim: H; a row is k and v, 2 H values.
    """
    dtype = jnp.dtype(dtype)
    rows = TUNED.get((num_kv_heads, head_dim, dtype.name))
    if rows is None:
        row_bytes = num_kv_heads * max(2 * head_dim, LANES) * dtype.itemsize
        rows = 1024
        while rows > 128 and rows * row_bytes > TARGET_BYTES:
            rows //= 2
    while cache_len % rows:
        rows //= 2
    return rows
