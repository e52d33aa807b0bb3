"""The one write of a decode step: every layer's new k and v, at each slot's position."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import AXIS, Backend, check_backend, check_shape, heads_per_shard, interpret_params, is_xla
from .pallas_tpu import cache_flush_tpu
from .reference import cache_flush_reference


def cache_flush(
    cache: jax.Array,
    new: jax.Array,
    position_B: jax.Array,
    *,
    token_axis: int = 3,
    mesh: Mesh,
    backend: Backend,
) -> jax.Array:
    """The cache with new[:, b] at token position_B[b] of slot b, in every layer; in place when the cache is donated.

    Args:
        cache: rows, cache_LBKSC of any dtype, or their scales, scale_LBK2S in f32; S a multiple of 128. Sharded on K.
        new: the step's rows new_LBKC, or scales new_LBK2, of the cache's dtype. Sharded on K.
        position_B: i32. A position outside [0, S) writes nothing at all: that is how dead and full slots are told.
        token_axis: where S stands: 3 for rows, 4 for scales.
        mesh: heads are sharded on its axis "tensor".
        backend: see `Backend`.

    Returns:
        The cache; all other tokens keep their bits.

    Raises:
        ValueError: shapes or dtypes that do not fit together, at trace time.
    """
    check_backend(backend)
    if token_axis not in (3, 4):
        raise ValueError(f"{token_axis=} must be 3 for rows [L, B, K, S, C] or 4 for scales [L, B, K, 2, S]")
    B, K, S = cache.shape[1], cache.shape[2], cache.shape[token_axis]
    heads_per_shard(mesh, K)
    of_a_token = tuple(size for axis, size in enumerate(cache.shape) if axis != token_axis)
    check_shape("new", new, of_a_token, "LBKC" if token_axis == 3 else "LBK2")
    check_shape("position_B", position_B, (B,), "B")
    if cache.dtype != new.dtype:
        raise ValueError(f"{new.dtype=} must be the cache's, {cache.dtype}; encode the new rows first")
    if S % 128:
        raise ValueError(f"cache length {S=} must be a multiple of 128; nearest above: {-(-S // 128) * 128}")

    if is_xla(backend):
        flush = cache_flush_reference
    else:
        flush = functools.partial(cache_flush_tpu, interpret=interpret_params(backend))
    heads = P(None, None, AXIS)
    sharded = jax.shard_map(
        functools.partial(flush, token_axis=token_axis),
        mesh=mesh,
        in_specs=(heads, heads, P()),
        out_specs=heads,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    return sharded(cache, new, position_B.astype(jnp.int32))
