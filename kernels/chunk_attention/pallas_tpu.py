"""Chunk attention on TPU: a Mosaic kernel that reads pages of the cache where they lie.

A step has one block of a text's queries and one block of keys: the chunk's own rows or a page. The softmax starts from
the block on the diagonal, of which every query sees something, goes back over the chunk's blocks before it, and then
over the text's pages. How many steps the longest block of queries has is known at run time only; the others idle at
their end, and fetch nothing there.

The compiler's schedule for v5e (`kernel_report.py`) with 1 kv head, G = 4, H = 128, bf16: a step of 256 queries issues
1,415 bundles, one a cycle, for a page of 256 rows, whose products take 1,022 cycles at the MXUs' peak and whose bytes
240; 2,254 for a page of 512 rows; 1,415 for a block of the chunk, on the diagonal or before it. A step of 128 queries
issues 903 for a page of 256 rows. The largest score stands in all lanes, and each lane sums for itself until the end:
with one number a query it was 1,568.

A step takes as many heads of a page as keep its queries at QUERY_ROWS.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..lanes import LANES, split_row
from ..scores import cap_scores, exact_scale

BLOCK = 256  # tokens of a chunk that are queries together, and keys together, at most
QUERY_ROWS = 1024  # queries of a step, of all its heads, at most; one kv head's may be twice as many
TOKEN_TILE = 16  # rows of a tile of bf16


def _kernel(
    layer_ref,  # [1] scalars: which layer; [2] where there is a window: and how many tokens it has
    steps_ref,  # [I]: steps of a block of queries
    own_ref,  # [I]: how many of the chunk's blocks before it are seen
    page_at_ref,  # [I]: where in the table its first page stands
    before_ref,  # [I]: how far that page's first row lies before its first query
    table_ref,  # [M * J]
    q_ref,  # [k, X, Q]: query x is of token x // G
    own_rows_ref,  # [k, S, C]
    sink_refs,  # [k, X, 1] f32; none where there are no sinks
    cache_refs,  # [k, R, C]; of an int8 cache also the scales, [k, 2, R] f32
    out_ref,  # [k, X, H]
    m_ref,  # [k, X, LANES] f32: largest score so far, in every lane
    l_ref,  # [k, X, LANES] f32: sum of exp(score - m) of the keys that fall into a lane
    acc_ref,  # [k, X, C or H] f32: sum of exp(score - m) v
    *,
    head_dim: int,
    soft_cap: float | None,
):
    """One block of queries, one block of keys. Q and acc's width are H where k and v are whole lane tiles, else C."""
    del page_at_ref, table_ref
    cache_ref, scale_ref = cache_refs if len(cache_refs) == 2 else (*cache_refs, None)
    i, step = pl.program_id(1), pl.program_id(2)
    (heads, X, _), S, R = q_ref.shape, own_rows_ref.shape[1], cache_ref.shape[1]
    G, own = X // S, own_ref[i]
    window = layer_ref[1] if layer_ref.shape == (2,) else None
    rest = head_dim**-0.5 / exact_scale(head_dim)
    # f32 operands in one bf16 pass would lose 16 bits.
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)

    def scores(k, k_SC, seen, scale_1S=None):
        score_XS = dot(q_ref[k], k_SC, (((1,), (1,)), ((), ())))
        score_XS = score_XS if rest == 1 else score_XS * rest
        score_XS = cap_scores(score_XS if scale_1S is None else score_XS * scale_1S, soft_cap)
        if seen is None:
            return score_XS
        query_XS, key_XS = (jax.lax.broadcasted_iota(jnp.int32, score_XS.shape, axis) for axis in (0, 1))
        return jnp.where(seen(query_XS, key_XS), score_XS, -jnp.inf)

    def row_max(score_XS):
        return jnp.broadcast_to(jnp.max(score_XS, axis=-1, keepdims=True), m_ref.shape[1:])

    def weigh(score_XS, m_XL, v_SC, scale_1S=None):
        """Sums of exp(score - m), lane by lane, and of exp(score - m) v."""
        p_XS = jnp.exp(score_XS - _lanes(m_XL, score_XS.shape[1]))
        weight_XS = (p_XS if scale_1S is None else p_XS * scale_1S).astype(v_SC.dtype)
        return _lane_sums(p_XS), dot(weight_XS, v_SC, (((1,), (0,)), ((), ())))

    def add_sink_to(k, sink_X1):
        """Each lane takes its part, as they are summed at the end."""
        m_XL = jnp.maximum(m_ref[k], sink_X1)
        decay_XL = jnp.exp(m_ref[k] - m_XL)
        m_ref[k] = m_XL
        l_ref[k] = l_ref[k] * decay_XL + jnp.exp(sink_X1 - m_XL) * (1 / LANES)
        acc_ref[k] = acc_ref[k] * _lanes(decay_XL, acc_ref.shape[2])

    @pl.when(step == 0)
    def start_from_diagonal():
        def seen(query_XS, key_XS):
            is_seen_XS = query_XS >= key_XS * G
            return is_seen_XS if window is None else is_seen_XS & (query_XS < (key_XS + window) * G)

        for k in range(heads):
            k_SC, v_SC = split_row(own_rows_ref[k], head_dim)
            score_XS = scores(k, k_SC, seen)
            m_ref[k] = row_max(score_XS)
            l_ref[k], acc_ref[k] = weigh(score_XS, m_ref[k], v_SC)
            for sink_ref in sink_refs:
                add_sink_to(k, sink_ref[k])

    def add(rows_ref, scale_ref, before, whole: bool):
        """Keys of which the first lies `before` tokens before the first query."""

        def seen(query_XS, key_XS):
            return query_XS < (key_XS + (window - before)) * G

        for k in range(heads):
            k_SC, v_SC = split_row(rows_ref[k].astype(q_ref.dtype), head_dim)
            scale_k_1S, scale_v_1S = (scale_ref[k, :1], scale_ref[k, 1:]) if scale_ref is not None else (None, None)
            score_XS = scores(k, k_SC, None if whole else seen, scale_k_1S)
            m_XL = jnp.maximum(m_ref[k], row_max(score_XS))
            decay_XL = jnp.exp(m_ref[k] - m_XL)
            l_XL, acc_XC = weigh(score_XS, m_XL, v_SC, scale_v_1S)
            m_ref[k] = m_XL
            l_ref[k] = l_ref[k] * decay_XL + l_XL
            acc_ref[k] = acc_ref[k] * _lanes(decay_XL, acc_XC.shape[1]) + acc_XC

    def add_block(is_here, rows_ref, scale_ref, before):
        if window is None:
            pl.when(is_here)(lambda: add(rows_ref, scale_ref, before, whole=True))
            return
        is_whole = before + S <= window  # the last query sees the first key
        pl.when(is_here & is_whole)(lambda: add(rows_ref, scale_ref, before, whole=True))
        pl.when(is_here & jnp.logical_not(is_whole))(lambda: add(rows_ref, scale_ref, before, whole=False))

    add_block((step > 0) & (step <= own), own_rows_ref, None, step * S)
    page_before = before_ref[i] - (step - own - 1) * R
    add_block((step > own) & (step < steps_ref[i]), cache_ref, scale_ref, page_before)

    @pl.when(step == steps_ref[i] - 1)
    def finish():
        out_kXC = acc_ref[...] / jnp.sum(l_ref[...], axis=-1, keepdims=True)
        out_ref[...] = out_kXC[..., -head_dim:].astype(out_ref.dtype)


def _lanes(x_XL: jax.Array, width: int) -> jax.Array:
    """What is the same in every lane, in so many."""
    if width < LANES:
        return x_XL[:, :width]
    return jnp.tile(x_XL, (1, width // LANES))


def _lane_sums(p_XS: jax.Array) -> jax.Array:
    """[X, LANES]: sums over the keys of a lane."""
    X, S = p_XS.shape
    if S < LANES:
        return jnp.concatenate([p_XS, jnp.zeros((X, LANES - S), p_XS.dtype)], axis=1)
    return functools.reduce(jnp.add, [p_XS[:, at : at + LANES] for at in range(0, S, LANES)])


@functools.partial(jax.jit, static_argnames=("soft_cap", "interpret"))
def chunk_attention_tpu(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    cache_LPKRC: jax.Array,
    scale_LPK2R: jax.Array | None,
    layer: jax.Array,
    start_M: jax.Array,
    page_MJ: jax.Array,
    window: jax.Array | None,
    sink_N: jax.Array | None,
    *,
    soft_cap: float | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """`op.chunk_attention` on one chip's heads; `layer` and `window` are i32 scalars."""
    (T, N, H), (pool, K, R, C), (M, J) = q_TNH.shape, cache_LPKRC.shape[1:], page_MJ.shape
    G, tokens = N // K, T // M
    S, heads = block_and_heads(tokens, K, G)
    blocks = -(-tokens // S)
    padded, X = blocks * S, G * S

    def in_texts(x_TNH: jax.Array) -> jax.Array:
        """[M, a text's tokens in whole blocks, ...], zeros at the end."""
        x_MTNH = x_TNH.reshape(M, tokens, *x_TNH.shape[1:])
        return jnp.pad(x_MTNH, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)))

    q_KXQ = in_texts(q_TNH * exact_scale(H)).reshape(-1, K, G, H).swapaxes(0, 1).reshape(K, -1, H)
    if H % LANES:
        q_KXQ = jnp.pad(q_KXQ, ((0, 0), (0, 0), (0, C - H)))
    rows_KTC = in_texts(jnp.concatenate([k_TKH, v_TKH], axis=-1)).reshape(-1, K, C).swapaxes(0, 1)
    Q = q_KXQ.shape[-1]

    if window is not None:
        window = jnp.minimum(window, J * R + padded)  # times G it is an i32
    lists = _list_blocks(start_M, window, blocks, S, J, R)
    layer_and_window = layer[None] if window is None else jnp.stack([layer, window])
    table = jnp.clip(page_MJ, 0, pool - 1).reshape(-1)  # entries that are not used may be anything

    def query_index(group, i, step, *refs):
        del step, refs
        return group, i, 0

    def own_index(group, i, step, layer_ref, steps_ref, own_ref, *refs):
        del layer_ref, steps_ref, refs
        return group, i - jnp.minimum(step, own_ref[i]), 0

    def page_index(group, i, step, layer_ref, steps_ref, own_ref, page_at_ref, before_ref, table_ref):
        del before_ref
        page = jnp.maximum(jnp.minimum(step, steps_ref[i] - 1) - own_ref[i] - 1, 0)
        return layer_ref[0], table_ref[page_at_ref[i] + page], group, 0, 0

    # A cache that VMEM could hold would else be moved there whole, pages that no text uses and all.
    in_hbm = functools.partial(pltpu.with_memory_space_constraint, memory_space=pltpu.HBM)
    cache, cache_specs = (in_hbm(cache_LPKRC),), (pl.BlockSpec((None, None, heads, R, C), page_index),)
    if scale_LPK2R is not None:
        cache = (*cache, in_hbm(scale_LPK2R))
        cache_specs = (*cache_specs, pl.BlockSpec((None, None, heads, 2, R), page_index))

    sinks = () if sink_N is None else (jnp.tile(sink_N.reshape(K, G), (1, S))[..., None],)

    out_KXH = pl.pallas_call(
        functools.partial(_kernel, head_dim=H, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(K // heads, M * blocks, jnp.max(lists[0])),
            in_specs=[
                pl.BlockSpec((heads, X, Q), query_index),
                pl.BlockSpec((heads, S, C), own_index),
                tuple(pl.BlockSpec((heads, X, 1), lambda group, *ids: (group, 0, 0)) for _ in sinks),
                cache_specs,
            ],
            out_specs=pl.BlockSpec((heads, X, H), query_index),
            scratch_shapes=[
                pltpu.VMEM((heads, X, LANES), jnp.float32),
                pltpu.VMEM((heads, X, LANES), jnp.float32),
                pltpu.VMEM((heads, X, Q), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((K, M * blocks * X, H), q_TNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(q_TNH, k_TKH, cache, M, J, Q),
        interpret=interpret,
        name=f"chunk_attention_{heads}x{H}_page{R}_block{S}",
    )(layer_and_window, *lists, table, q_KXQ, rows_KTC, sinks, cache)
    out_MTNH = out_KXH.reshape(K, M, padded, G, H).transpose(1, 2, 0, 3, 4).reshape(M, padded, N, H)
    return out_MTNH[:, :tokens].reshape(T, N, H)


def block_and_heads(tokens: int, num_kv_heads: int, group: int) -> tuple[int, int]:
    """(tokens of a block, kv heads of a step) for texts of so many tokens.

    Blocks of 256 where they are as well filled as those of 128, and where a kv head's queries are not too many.
    """
    block = LANES if tokens > LANES else -(-tokens // TOKEN_TILE) * TOKEN_TILE
    if tokens > LANES and -(-tokens // BLOCK) * 2 == -(-tokens // LANES) and group * BLOCK <= QUERY_ROWS:
        block = BLOCK
    while block > TOKEN_TILE and block * group > 2 * QUERY_ROWS:
        block = max(block // 2 // TOKEN_TILE, 1) * TOKEN_TILE
    heads = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n * group * block <= QUERY_ROWS]
    return block, max(heads, default=1)


def _list_blocks(
    start_M: jax.Array, window: jax.Array | None, blocks: int, S: int, J: int, R: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each of the M * blocks blocks of queries what the kernel asks of it: (steps, own, page_at, before)."""
    M = start_M.size
    own_row_MB = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32) * S, (M, blocks))
    row_MB = start_M[:, None] + own_row_MB
    first_MB = jnp.zeros_like(row_MB) if window is None else jnp.maximum(row_MB - window + 1, 0)
    pages_M1 = (start_M // R)[:, None]
    page_MB = jnp.minimum(first_MB // R, pages_M1)
    own_MB = own_row_MB // S - jnp.maximum(first_MB - start_M[:, None], 0) // S
    table_MB = jnp.arange(M, dtype=jnp.int32)[:, None] * J + jnp.minimum(page_MB, J - 1)
    steps_MB = 1 + own_MB + pages_M1 - page_MB
    return steps_MB.reshape(-1), own_MB.reshape(-1), table_MB.reshape(-1), (row_MB - page_MB * R).reshape(-1)


def _cost(q_TNH, k_TKH, cache, texts: int, pages: int, q_lanes: int) -> pl.CostEstimate:
    """Starts are not known when a program is compiled: half of the pages that a text may have, half of its chunk."""
    (T, N, _), (layers, pool, _, rows, _) = q_TNH.shape, cache[0].shape
    scores = T * N * (pages * rows + T // texts) // 2
    page_bytes = sum(leaf.nbytes for leaf in cache) // (layers * pool)
    return pl.CostEstimate(
        flops=4 * scores * q_lanes,
        transcendentals=scores,
        bytes_accessed=2 * (q_TNH.nbytes + k_TKH.nbytes) + texts * pages * page_bytes // 2,
    )
