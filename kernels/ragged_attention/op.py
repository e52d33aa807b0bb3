"""Decode attention: a step's tokens of each slot over the slot's pages of the stacked cache, and over each other."""

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
from .native_cpu import ragged_attention_native
from .pallas_tpu import ragged_attention_tpu
from .reference import ragged_attention_reference
from .steps import Steps, live_steps
from .xla_gpu import ragged_attention_gpu


def ragged_attention(
    q_BWNH: jax.Array,
    new_BWKC: jax.Array,
    cache_LPKRC: jax.Array,
    layer: jax.Array | int,
    length_B: jax.Array,
    page_BJ: jax.Array,
    steps: Steps | None = None,
    *,
    scale_LPK2R: jax.Array | None = None,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    sink_N: jax.Array | None = None,
    mesh: Mesh,
    backend: Backend,
) -> jax.Array:
    """Softmax attention (scale H**-0.5) of a step's W tokens per slot, each over what stands before it and itself.

    Token w of a slot stands behind its cached rows [0, length) and the step's tokens before it, at position length + w.
    Row s of slot b is row s % R of page page_BJ[b, s // R]. The step's tokens are not in the cache: each layer returns
    their k and v, and `cache_flush` writes them all at the step's end. So the cache is only read here, and the softmax
    starts from them: with W = 1 m, l, acc = q . k_new, 1, v_new.

    Args:
        q_BWNH: queries, rope applied; bf16 or f32. Query head n uses kv head n // (N / K). Sharded on N, as K. All W
            tokens share one read of the cache.
        new_BWKC: the step's own k and v side by side (C = 2 H), q's dtype; finite. Sharded on K.
        cache_LPKRC: all layers' pages of k and v, q's dtype, or int8 codes with scales; R a multiple of 128 on TPUs,
            of 16 elsewhere. Sharded on K. Rows at or past a slot's length are never used, whatever they hold, NaN
            included; nor their scales, nor pages that are in no table.
        layer: which layer to read, a Python int or an i32 scalar, traced or not.
        length_B: i32, rows in use, 0 <= length <= J R. With 0 the first token gives exactly its v_new, if there are
            no sinks.
        page_BJ: i32, the pages of each slot, its first tokens' first. Entries behind the last row are not used. Slots
            may share pages.
        steps: `attention_steps` of these lengths and pages, and of this window. None lists them here, once a call.
        scale_LPK2R: f32, what an int8 row's k and v are to be multiplied by. Sharded on K. The scores and the softmax's
            weights are multiplied instead, so that k and v are nowhere stored dequantised.
        window: how many tokens a query sees, itself included: positions (length + w - window, length + w]. An i32
            scalar, traced or not: layers under one scan may differ, J R + W and above being everything. None is
            everything too, by a program that has no windows. Only the pages of the first token's window are read.
        soft_cap: scores become cap * tanh(score / cap), after scaling (arXiv:2408.00118). None: they do not.
        sink_N: a learned score of each query head that has no key and no value: it takes part in the softmax, after
            scale and cap, and adds nothing to the answer. Sharded as q's heads. None: there is none.
        mesh: heads are sharded on its axis "tensor".
        backend: see `Backend`.

    Returns:
        out_BWNH, q's dtype, sharded as q.

    Raises:
        ValueError: shapes, dtypes or head counts that do not fit together, a window below 1 or a cap not above 0, at
            trace time.
    """
    check_backend(backend)
    check_window(window)
    check_soft_cap(soft_cap)
    if q_BWNH.ndim != 4:
        raise ValueError(f"q_BWNH must be [B, W, N, H], got {q_BWNH.shape}; one token per slot is W = 1")
    (_, _, K, R, C), (B, W, N, H) = cache_LPKRC.shape, q_BWNH.shape
    heads_per_shard(mesh, K, N)
    check_dtypes(q_BWNH=q_BWNH, new_BWKC=new_BWKC)
    if scale_LPK2R is None:
        check_dtypes(q_BWNH=q_BWNH, cache_LPKRC=cache_LPKRC)
    check_cache(cache_LPKRC, scale_LPK2R, layer, head_dim=H, backend=backend)
    check_shape("new_BWKC", new_BWKC, (B, W, K, C), "BWKC")
    check_shape("length_B", length_B, (B,), "B")
    check_pages("page_BJ", page_BJ, texts=B, rows=R, is_tiled=not is_xla(backend))
    if sink_N is not None:
        check_shape("sink_N", sink_N, (N,), "N")
        sink_N = sink_N.astype(jnp.float32)

    heads, length_B, page_BJ = P(None, None, AXIS), length_B.astype(jnp.int32), page_BJ.astype(jnp.int32)
    window = None if window is None else jnp.asarray(window, jnp.int32)
    operands = ()
    if is_xla(backend):
        attention = ragged_attention_gpu if backend == "xla_gpu" else ragged_attention_reference
        if backend == "native_cpu" and q_BWNH.dtype == jnp.float32:
            attention = ragged_attention_native
    else:
        attention = functools.partial(ragged_attention_tpu, interpret=interpret_params(backend))
        operands = (steps or _list_steps(cache_LPKRC, length_B, page_BJ, window, None, mesh, backend),)
    sharded = jax.shard_map(
        functools.partial(attention, soft_cap=soft_cap),
        mesh=mesh,
        in_specs=(heads, heads, heads, heads, P(), P(), P(), P(), P(AXIS), *(P() for _ in operands)),
        out_specs=heads,
        check_vma=False,  # pallas_call's results carry no varying-axes type
    )
    layer = jnp.asarray(layer, jnp.int32)
    return sharded(q_BWNH, new_BWKC, cache_LPKRC, scale_LPK2R, layer, length_B, page_BJ, window, sink_N, *operands)


def attention_steps(
    cache_LPKRC: jax.Array,
    length_B: jax.Array,
    page_BJ: jax.Array,
    *,
    window: jax.Array | int | None = None,
    max_pages: int | None = None,
    mesh: Mesh,
    backend: Backend,
) -> Steps | None:
    """What all layers of a window have in common in a decode step, for `ragged_attention`: which pages to read.

    Depends on lengths, page table and window only, but a scan over layers would list them anew for each: XLA leaves
    there what is larger than it is made of. Has the same shapes whatever the window: where layers differ, list once for
    each window (J R + 1 for all) and pick. None where the backend has no use for it.

    `max_pages`: entries of the page table that hold live rows at once, at most. None: the pool's P, which is right
    while no page is in two slots' tables; else it is the sum of the references.
    """
    check_window(window)
    is_tiled = not is_xla(backend)
    check_pages("page_BJ", page_BJ, texts=length_B.shape[0], rows=cache_LPKRC.shape[3], is_tiled=is_tiled)
    if not is_tiled:
        return None
    window = None if window is None else jnp.asarray(window, jnp.int32)
    return _list_steps(cache_LPKRC, length_B, page_BJ, window, max_pages, mesh, backend)


def _list_steps(
    cache_LPKRC: jax.Array,
    length_B: jax.Array,
    page_BJ: jax.Array,
    window: jax.Array | None,
    max_pages: int | None,
    mesh: Mesh,
    backend: Backend,
) -> Steps:
    listing = functools.partial(
        live_steps,
        rows=cache_LPKRC.shape[3],
        max_pages=max_pages or cache_LPKRC.shape[1],
        cores=None if backend == "pallas" else 1,
        interpret=interpret_params(backend),
    )
    sharded = jax.shard_map(
        listing,
        mesh=mesh,  # tells what chip it is
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    return sharded(length_B.astype(jnp.int32), window, page_BJ.astype(jnp.int32))
