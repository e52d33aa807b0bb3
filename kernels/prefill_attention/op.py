"""Causal self-attention of one padded prompt."""

import functools

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import (
    AXIS,
    Backend,
    check_backend,
    check_dtypes,
    check_shape,
    heads_per_shard,
    interpret_params,
    is_xla,
)
from ..scores import check_soft_cap, check_window
from .pallas_tpu import prefill_attention_tpu
from .reference import prefill_attention_reference


def prefill_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    mesh: Mesh,
    backend: Backend,
) -> jax.Array:
    """Softmax attention (scale H**-0.5) of every token over itself and the tokens before it.

    Padding belongs at the end: causality keeps it out of the real rows, and the padding's own rows mean nothing.

    Args:
        q_TNH: queries, rope applied; bf16 or f32. Query head n uses kv head n // (N / K). Sharded on N, as K.
        k_TKH, v_TKH: q's dtype. Sharded on K.
        window: how many tokens a query sees, itself included: key j is seen by query i iff i - window < j <= i. Blocks
            outside are not computed. None: all tokens before it.
        soft_cap: scores become cap * tanh(score / cap), after scaling (arXiv:2408.00118). None: they do not.
        mesh: heads are sharded on its axis "tensor".
        backend: see `Backend`.

    Returns:
        out_TNH, q's dtype, sharded as q.

    Raises:
        ValueError: shapes, dtypes or head counts that do not fit together, a window below 1 or a cap not above 0, at
            trace time.
    """
    check_backend(backend)
    check_window(window)
    check_soft_cap(soft_cap)
    (T, N, H), K = q_TNH.shape, k_TKH.shape[1]
    heads_per_shard(mesh, K, N)
    check_dtypes(q_TNH=q_TNH, k_TKH=k_TKH, v_TKH=v_TKH)
    check_shape("k_TKH", k_TKH, (T, K, H), "TKH")
    check_shape("v_TKH", v_TKH, (T, K, H), "TKH")

    if is_xla(backend):
        attention = prefill_attention_reference
    else:
        attention = functools.partial(prefill_attention_tpu, interpret=interpret_params(backend))
    heads = P(None, AXIS)
    sharded = jax.shard_map(
        functools.partial(attention, window=window, soft_cap=soft_cap),
        mesh=mesh,
        in_specs=(heads, heads, heads),
        out_specs=heads,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    return sharded(q_TNH, k_TKH, v_TKH)
