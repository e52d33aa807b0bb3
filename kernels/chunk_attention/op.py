"""Chunk attention: chunks of texts over the texts' pages of the stacked cache, and causally over themselves."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..backend import (
    AXIS,
    Backend,
    check_backend,
    check_cache,
    check_dtypes,
    check_pages,
    check_shape,
    heads_per_shard,
    interpret_params,
    is_xla,
)
from ..scores import check_soft_cap, check_window
from .native_cpu import chunk_attention_native
from .pallas_tpu import chunk_attention_tpu
from .reference import chunk_attention_reference
from .xla_gpu import chunk_attention_gpu


def chunk_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    cache_LPKRC: jax.Array,
    layer: jax.Array | int,
    start_M: jax.Array,
    page_MJ: jax.Array,
    *,
    count_M: jax.Array | None = None,
    scale_LPK2R: jax.Array | None = None,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    sink_N: jax.Array | None = None,
    mesh: Mesh,
    backend: Backend,
) -> jax.Array:
    """Softmax attention (scale H**-0.5) of each token over its text's cached rows and the chunk's up to itself.

    The T rows are the chunks of M texts, T / M rows each, one text behind the other. Row i of text m stands at position
    start_M[m] + i, behind the start_M[m] rows that the cache has of the text; row s of them is row s % R of page
    page_MJ[m, s // R]. The chunk's own k and v need not be in the cache, which is only read here.

    Padding belongs at the end of a text's chunk: causality keeps it out of the real rows, and the padding's own rows
    mean nothing. It must be finite, but where the native kernel knows its `count_M`: that reads none of it, and gives
    zeros there.

    Args:
        q_TNH: queries, rope applied; bf16 or f32. Query head n uses kv head n // (N / K). Sharded on N, as K.
        k_TKH, v_TKH: q's dtype. Sharded on K.
        cache_LPKRC: all layers' pages of k and v side by side (C = 2 H), q's dtype, or int8 codes with scales; R a
            multiple of 128, of 16 on CPUs. Sharded on K. Pages behind the start, and those before all queries' windows,
            are not read.
        layer: which layer to read, a Python int or an i32 scalar, traced or not.
        start_M: i32, rows of each text in the cache, multiples of R, at most J R. 0 reads nothing.
        page_MJ: i32, the pages of each text, its first tokens' first. Texts may share pages.
        count_M: i32, rows of each text's chunk that are no padding, up to T / M. Of use to the native kernel alone, to
            which padding then costs next to nothing. None: all.
        scale_LPK2R: f32, what an int8 row's k and v are to be multiplied by. Sharded on K.
        window: how many tokens a query sees, itself included. A Python int or an i32 scalar, traced or not: layers
            under one scan may differ. What no query of a block sees is not computed. None is everything.
        soft_cap: scores become cap * tanh(score / cap), after scaling (arXiv:2408.00118). None: they do not.
        sink_N: a learned score of each query head that has no key and no value: it takes part in the softmax, after
            scale and cap, and adds nothing to the answer. Sharded as q's heads. None: there is none.
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
    (_, _, K, R, _), (T, N, H) = cache_LPKRC.shape, q_TNH.shape
    heads_per_shard(mesh, K, N)
    check_dtypes(q_TNH=q_TNH, k_TKH=k_TKH, v_TKH=v_TKH)
    check_shape("k_TKH", k_TKH, (T, K, H), "TKH")
    check_shape("v_TKH", v_TKH, (T, K, H), "TKH")
    if scale_LPK2R is None:
        check_dtypes(q_TNH=q_TNH, cache_LPKRC=cache_LPKRC)
    check_cache(cache_LPKRC, scale_LPK2R, layer, head_dim=H, backend=backend)
    if start_M.ndim != 1 or not start_M.size or T % start_M.size:
        raise ValueError(f"start_M must be [M], M a divisor of the {T=} rows, got {start_M.shape}")
    if count_M is not None:
        check_shape("count_M", count_M, start_M.shape, "M")
        count_M = count_M.astype(jnp.int32)
    check_pages("page_MJ", page_MJ, texts=start_M.size, rows=R, is_tiled=backend not in ("xla", "native_cpu"))
    if sink_N is not None:
        check_shape("sink_N", sink_N, (N,), "N")
        sink_N = sink_N.astype(jnp.float32)

    layer = jnp.asarray(layer, jnp.int32)
    window = None if window is None else jnp.asarray(window, jnp.int32)
    texts = (start_M.astype(jnp.int32),)
    if is_xla(backend):
        attention = chunk_attention_gpu if backend == "xla_gpu" else chunk_attention_reference
        if backend == "native_cpu" and q_TNH.dtype == jnp.float32:
            attention = chunk_attention_native
            texts += (jnp.full(start_M.shape, T // start_M.size) if count_M is None else count_M,)
    else:
        attention = functools.partial(chunk_attention_tpu, interpret=interpret_params(backend))
    heads, pages = P(None, AXIS), P(None, None, AXIS)
    sharded = jax.shard_map(
        functools.partial(attention, soft_cap=soft_cap),
        mesh=mesh,
        in_specs=(heads, heads, heads, pages, pages, P(), *(P() for _ in texts), P(), P(), P(AXIS)),
        out_specs=heads,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    page_MJ = page_MJ.astype(jnp.int32)
    return sharded(q_TNH, k_TKH, v_TKH, cache_LPKRC, scale_LPK2R, layer, *texts, page_MJ, window, sink_N)
