"""Insert: one of the two places where the stacked cache changes (the other is the flush)."""

from math import gcd

import jax
import jax.numpy as jnp

from .codec import KV, Codec
from .flush import rows


def prompt_rows(k_TKH: jax.Array, v_TKH: jax.Array, codec: Codec) -> KV:
    """A layer's share of what `insert` takes: pieces' rows_KTC, and their scales_K2T if the codec has any.

    Encoded here, once, and not at every insert: a prefix that waits, or serves several slots, is as small as its rows
    in the cache, and insert writes what it is given.
    """
    kv = codec.encode(rows(k_TKH, v_TKH))
    return KV(kv.rows.swapaxes(0, 1), None if kv.scales is None else kv.scales.transpose(1, 2, 0))


def insert(cache: KV, texts: KV, page_NJ: jax.Array, start_N: jax.Array, count_N: jax.Array) -> KV:
    """Write rows of N texts (LKTC, scales LK2T; T / N of each, one text behind another) into the texts' pages, in place
    when the cache is donated. A text's first row is its token `start`; `count` of them are written.

    Page after page, none that holds no such row. Padding behind a text's count comes along into its last page: it lies
    beyond the text's length, where nobody reads. On v5e an insert of 2048 tokens takes as many static cycles as it took
    into one run of memory (0.380 M, then 0.358 M, 1 head a chip).

    Args:
        page_NJ: i32, the texts' rows of the page table.
        start_N: i32, a multiple of the page's rows.
        count_N: i32, 0 <= count <= T / N.
    """
    N, page_rows = page_NJ.shape[0], cache.rows.shape[3]
    padded = texts.rows.shape[2] // N
    piece = gcd(padded, page_rows)  # a page, or the whole text where that is smaller

    def write_text(text: jax.Array, cache: KV) -> KV:
        def write_piece(index: jax.Array, cache: KV) -> KV:
            token, zero = start_N[text] + index * piece, jnp.zeros_like(index)
            page, row = page_NJ[text, token // page_rows], token % page_rows

            def write(of_cache: jax.Array, of_texts: jax.Array, row_axis: int) -> jax.Array:
                first = text * padded + index * piece
                part = jax.lax.dynamic_slice_in_dim(of_texts, first, piece, axis=row_axis - 1)
                at = [zero, page, zero, zero, zero]
                at[row_axis] = row
                return jax.lax.dynamic_update_slice(of_cache, part[:, None], at)

            rows = write(cache.rows, texts.rows, 3)
            if cache.scales is None or texts.scales is None:
                return KV(rows)
            return KV(rows, write(cache.scales, texts.scales, 4))

        return jax.lax.fori_loop(0, (count_N[text] + piece - 1) // piece, write_piece, cache)

    return write_text(jnp.int32(0), cache) if N == 1 else jax.lax.fori_loop(0, N, write_text, cache)
