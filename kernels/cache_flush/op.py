"""The one write of a decode step: every layer's new k and v, behind each slot's last row."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import AXIS, Backend, check_backend, check_pages, check_shape, heads_per_shard, interpret_params, is_xla
from .pallas_tpu import MOST_TOKENS, cache_flush_tpu
from .reference import cache_flush_reference


def cache_flush(
    cache: jax.Array,
    new: jax.Array,
    position_B: jax.Array,
    count_B: jax.Array,
    page_BJ: jax.Array,
    *,
    row_axis: int = 3,
    mesh: Mesh,
    backend: Backend,
) -> jax.Array:
    """The cache with the first `count` of a slot's W new rows from token `position` on, in every layer; in place when
    the cache is donated.

    Token s of slot b is row s % R of page page_BJ[b, s // R]. No two slots may write into one page.

    Args:
        cache: pages of rows, cache_LPKRC of any dtype, or of their scales, scale_LPK2R in f32; R a multiple of 128
            on TPUs, of 16 elsewhere. Sharded on K.
        new: the step's rows new_LBWKC, or scales new_LBWK2, of the cache's dtype; W at most 8 on TPUs. Sharded on K.
        position_B: i32, the token that a slot's first new row is.
        count_B: i32, how many of its rows are stored, 0 to W; those behind them are nowhere seen. Tokens outside
            [0, J R) are not stored either.
        page_BJ: i32, the pages of each slot; only those of tokens that are stored are looked at.
        row_axis: where R stands: 3 for rows, 4 for scales.
        mesh: heads are sharded on its axis "tensor".
        backend: see `Backend`.

    Returns:
        The cache; all other rows keep their bits.

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
    """
    check_backend(backend)
    if row_axis not in (3, 4):
        raise ValueError(f"{row_axis=} must be 3 for rows [L, P, K, R, C] or 4 for scales [L, P, K, 2, R]")
    if new.ndim != 5:
        raise ValueError(f"new must have 5 axes, [L, B, W, K, C] or [L, B, W, K, 2], got {new.shape}")
    (L, _, K), (B,), R = cache.shape[:3], position_B.shape, cache.shape[row_axis]
    heads_per_shard(mesh, K)
    of_a_row = tuple(size for axis, size in enumerate(cache.shape) if axis not in (0, 1, row_axis))
    check_shape("new", new, (L, B, new.shape[2], *of_a_row), "LBWKC" if row_axis == 3 else "LBWK2")
    check_shape("count_B", count_B, (B,), "B")
    check_pages("page_BJ", page_BJ, texts=B, rows=R, is_tiled=not is_xla(backend))
    if cache.dtype != new.dtype:
        raise ValueError(f"{new.dtype=} must be the cache's, {cache.dtype}; encode the new rows first")

    if not is_xla(backend) and new.shape[2] > MOST_TOKENS:
        raise ValueError(
            f"W={new.shape[2]} tokens per slot must be at most {MOST_TOKENS} on a TPU; flush them in parts"
        )

    if is_xla(backend):
        flush = cache_flush_reference
    else:
        cores = None if backend == "pallas" else 1
        flush = functools.partial(cache_flush_tpu, cores=cores, interpret=interpret_params(backend))
    sharded = jax.shard_map(
        functools.partial(flush, row_axis=row_axis),
        mesh=mesh,
        in_specs=(P(None, None, AXIS), P(None, None, None, AXIS), P(), P(), P()),
        out_specs=P(None, None, AXIS),
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    where = (position_B.astype(jnp.int32), count_B.astype(jnp.int32), page_BJ.astype(jnp.int32))
    return sharded(cache, new, *where)
