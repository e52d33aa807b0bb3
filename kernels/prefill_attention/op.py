"""Causal self-attention of one padded prompt."""

import functools

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import AXIS, Backend, check_backend, check_dtypes, check_shape, heads_per_shard, interpret_params
from .pallas_tpu import prefill_attention_tpu
from .reference import prefill_attention_reference


def prefill_attention(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, *, mesh: Mesh, backend: Backend
) -> jax.Array:
    """Softmax attention (scale H**-0.5) of every token over itself and the tokens before it.

    Padding belongs at the end: causality keeps it out of the real rows, and the padding's own rows mean nothing.

    Args:
        q_TNH: queries, rope applied; bf16 or f32. Query head n uses kv head n // (N / K). Sharded on N, as K.
        k_TKH, v_TKH: q's dtype. Sharded on K.
        mesh: heads are sharded on its axis "tensor".
        backend: see `Backend`.

    Returns:
        out_TNH, q's dtype, sharded as q.

    Raises:
        ValueError: shapes, dtypes or head counts that do not fit together, at trace time.
    """
    check_backend(backend)
    (T, N, H), K = q_TNH.shape, k_TKH.shape[1]
    heads_per_shard(mesh, K, N)
    check_dtypes(q_TNH=q_TNH, k_TKH=k_TKH, v_TKH=v_TKH)
    check_shape("k_TKH", k_TKH, (T, K, H), "TKH")
    check_shape("v_TKH", v_TKH, (T, K, H), "TKH")

    if backend == "xla":
        attention = prefill_attention_reference
    else:
        attention = functools.partial(prefill_attention_tpu, interpret=interpret_params(backend))
    heads = P(None, AXIS)
    sharded = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(heads, heads, heads),
        out_specs=heads,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    return sharded(q_TNH, k_TKH, v_TKH)
