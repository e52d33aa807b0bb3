"""The one write of a decode step: every layer's new k and v, at each slot's position."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import AXIS, Backend, check_backend, check_pages, check_shape, heads_per_shard, interpret_params, is_xla
from .pallas_tpu import cache_flush_tpu
from .reference import cache_flush_reference


def cache_flush(
    cache: jax.Array,
    new: jax.Array,
    position_B: jax.Array,
    page_BJ: jax.Array,
    *,
    row_axis: int = 3,
    mesh: Mesh,
    backend: Backend,
) -> jax.Array:
    """The cache with new[:, b] at token position_B[b] of slot b, in every layer; in place when the cache is donated.

    Token s of slot b is row s % R of page page_BJ[b, s // R]. No two slots may write into one page.

    Args:
        cache: pages of rows, cache_LPKRC of any dtype, or of their scales, scale_LPK2R in f32; R a multiple of 128.
            Sharded on K.
        new: the step's rows new_LBKC, or scales new_LBK2, of the cache's dtype. Sharded on K.
        position_B: i32. A position outside [0, J R) writes nothing at all: that is how dead and full slots are told.
        page_BJ: i32, the pages of each slot; only that of its position is looked at.
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
    (L, _, K), (B,), R = cache.shape[:3], position_B.shape, cache.shape[row_axis]
    heads_per_shard(mesh, K)
    of_a_row = tuple(size for axis, size in enumerate(cache.shape) if axis not in (0, 1, row_axis))
    check_shape("new", new, (L, B, *of_a_row), "LBKC" if row_axis == 3 else "LBK2")
    check_pages("page_BJ", page_BJ, texts=B, rows=R)
    if cache.dtype != new.dtype:
        raise ValueError(f"{new.dtype=} must be the cache's, {cache.dtype}; encode the new rows first")

    if is_xla(backend):
        flush = cache_flush_reference
    else:
        cores = None if backend == "pallas" else 1
        flush = functools.partial(cache_flush_tpu, cores=cores, interpret=interpret_params(backend))
    heads = P(None, None, AXIS)
    sharded = jax.shard_map(
        functools.partial(flush, row_axis=row_axis),
        mesh=mesh,
        in_specs=(heads, heads, P(), P()),
        out_specs=heads,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    page_B, row_B = _places(position_B.astype(jnp.int32), page_BJ.astype(jnp.int32), R)
    return sharded(cache, new, page_B, row_B)


def _places(position_B: jax.Array, page_BJ: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """i32 (page_B, row_B) of each slot's position; row -1 where there is nothing to write."""
    J = page_BJ.shape[1]
    is_inside_B = (position_B >= 0) & (position_B < J * rows)
    is_page_BJ = jnp.arange(J, dtype=jnp.int32)[None, :] == (position_B // rows)[:, None]
    page_B = jnp.sum(jnp.where(is_page_BJ, page_BJ, 0), axis=1, dtype=jnp.int32)
    return page_B, jnp.where(is_inside_B, position_B % rows, -1)
