"""The one write of a decode step: every layer's new k and v, at each slot's position."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import AXIS, Backend, check_backend, check_shape, heads_per_shard, interpret_params
from .pallas_tpu import cache_flush_tpu
from .reference import cache_flush_reference


def cache_flush(
    cache_LBKSC: jax.Array, new_LBKC: jax.Array, position_B: jax.Array, *, mesh: Mesh, backend: Backend
) -> jax.Array:
    """The cache with new_LBKC[:, b] at row position_B[b] of slot b, in every layer; in place when the cache is donated.

    Args:
        cache_LBKSC: any dtype; S a multiple of 128. Sharded on K.
        new_LBKC: the step's rows, the cache's dtype. Sharded on K.
        position_B: i32. A position outside [0, S) writes nothing at all: that is how dead and full slots are told.
        mesh: heads are sharded on its axis "tensor".
        backend: see `Backend`.

    Returns:
        cache_LBKSC; every other row keeps its bits.

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
    """
    check_backend(backend)
    L, B, K, S, C = cache_LBKSC.shape
    heads_per_shard(mesh, K)
    check_shape("new_LBKC", new_LBKC, (L, B, K, C), "LBKC")
    check_shape("position_B", position_B, (B,), "B")
    if cache_LBKSC.dtype != new_LBKC.dtype:
        raise ValueError(f"{new_LBKC.dtype=} must be the cache's, {cache_LBKSC.dtype}; encode the new rows first")
    if S % 128:
        raise ValueError(f"cache length {S=} must be a multiple of 128; nearest above: {-(-S // 128) * 128}")

    if backend == "xla":
        flush = cache_flush_reference
    else:
        flush = functools.partial(cache_flush_tpu, interpret=interpret_params(backend))
    heads = P(None, None, AXIS)
    sharded = jax.shard_map(
        flush,
        mesh=mesh,
        in_specs=(heads, heads, P()),
        out_specs=heads,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    return sharded(cache_LBKSC, new_LBKC, position_B.astype(jnp.int32))
