"""A row of the cache, k and v side by side, in a TPU's tiles."""

import jax

LANES = 128


def split_row(rows: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Rows [..., C] as (k, v), cut only at a border of lane tiles.

    With H = 64 the border falls inside a tile. There the rows stand for both: q is padded with zeros, so that q . row
    is q . k, and of p @ row the last H lanes are p @ v.
    """
    if head_dim % LANES:
        return rows, rows
    return rows[..., :head_dim], rows[..., head_dim:]
