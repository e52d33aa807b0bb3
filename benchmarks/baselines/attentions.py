"""Decode attentions to time against each other: ours, XLA's plain forms, and JAX's own paged kernels.

Each gets the cache in the layout it likes best, prepared beforehand, an array a layer. Ours gets the step's new row
apart; the others find it in their caches, at the end of the slot's rows, as an eager cache has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...cache_manager import KV, Plain, tuned_page_rows
from ...engine_impl.attention import attend_cache
from ...kernels import Backend

PAGE = 128  # rows of a page; a multiple of every TPU tile, and vLLM's choice there is 16 to 256
PAGES_PER_BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is attended to."""

    q_BNH: jax.Array
    new_BKC: jax.Array
    cache_LBKSC: jax.Array
    length_B: jax.Array
    mesh: jax.sharding.Mesh

    def with_new_rows(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """One layer's k_BKSH and v_BKSH, the new rows in their places."""
        B, K, _ = self.new_BKC.shape
        b_B1, k_1K = jnp.ogrid[:B, :K]
        cache_BKSC = self.cache_LBKSC[layer].at[b_B1, k_1K, self.length_B[:, None]].set(self.new_BKC)
        H = self.q_BNH.shape[-1]
        return cache_BKSC[..., :H], cache_BKSC[..., H:]


@dataclass(frozen=True)
class AttentionVariant:
    """One way to attend."""

    name: str
    prepare: Callable[[Case], Any]
    """Its arrays: of all layers"""
    attend: Callable[[jax.Array, int, Any], jax.Array]
    """(q_BNH, layer, arrays) -> out_BNH"""


def attentions(platform: str, backend: Backend, mesh: jax.sharding.Mesh) -> list[AttentionVariant]:
    """Those that this platform is meant to run; the first is the engine's, the second XLA's definition of it."""
    found = [ours(backend, mesh, f"slipstream ({backend})")]
    if backend != "xla":
        found.append(ours("xla", mesh, "slipstream (xla)"))
    found += [
        AttentionVariant("einsum over all rows", _prepare_dense, _attend_dense),
        AttentionVariant("jax.nn.dot_product_attention", _prepare_jax_nn, _attend_jax_nn),
    ]
    if platform == "tpu":
        found += [
            AttentionVariant("jax paged_attention (tpu)", _prepare_paged, _attend_paged_tpu),
            AttentionVariant("jax ragged_paged_attention (tpu)", _prepare_ragged_paged, _attend_ragged_paged),
        ]
    if platform == "gpu":
        found.append(AttentionVariant("jax paged_attention (gpu)", _prepare_paged, _attend_paged_gpu))
    return found


def ours(backend: Backend, mesh: jax.sharding.Mesh, name: str) -> AttentionVariant:
    """The engine's own over the stacked cache in pages."""

    def prepare(case: Case) -> Any:
        L, B, K, S, C = case.cache_LBKSC.shape
        of_slot: Any = {"kv_heads": K, "head_dim": C // 2, "length": S, "dtype": case.cache_LBKSC.dtype}
        R = tuned_page_rows(**of_slot, codec=Plain(), mesh=mesh, backend=backend)
        cache_LPKRC = case.cache_LBKSC.reshape(L, B, K, S // R, R, C).swapaxes(2, 3).reshape(L, -1, K, R, C)
        return case.new_BKC, cache_LPKRC, case.length_B, _page_table(B, S, R)

    def attend(q_BNH: jax.Array, layer: int, arrays: Any) -> jax.Array:
        new_BKC, cache_LPKRC, length_B, page_BJ = arrays
        k_BKH, v_BKH = jnp.split(new_BKC, 2, axis=-1)
        attend = attend_cache(KV(cache_LPKRC), length_B, page_BJ, mesh=mesh, backend=backend)
        return attend.call(jnp.int32(layer), 0, q_BNH, k_BKH, v_BKH)

    return AttentionVariant(name, prepare, attend)


def _per_layer(case: Case, arrange: Callable[[jax.Array, jax.Array], Any]) -> Any:
    """(an item a layer, lengths with the new row)."""
    items = [arrange(*case.with_new_rows(layer)) for layer in range(case.cache_LBKSC.shape[0])]
    return items, case.length_B + 1


def _prepare_dense(case: Case) -> Any:
    return _per_layer(case, lambda k_BKSH, v_BKSH: (k_BKSH, v_BKSH))


def _attend_dense(q_BNH: jax.Array, layer: int, arrays: Any) -> jax.Array:
    """The textbook: scores over all S rows, those past the length masked."""
    items, length_B = arrays
    (k_BKSH, v_BKSH), (B, N, H) = items[layer], q_BNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    score_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    live_BS = jnp.arange(S) < length_B[:, None]
    p_BKGS = jax.nn.softmax(jnp.where(live_BS[:, None, None], score_BKGS, -jnp.inf), axis=-1)
    out_BKGH = jnp.einsum("BKGS,BKSH->BKGH", p_BKGS.astype(v_BKSH.dtype), v_BKSH)
    return out_BKGH.reshape(B, N, H).astype(q_BNH.dtype)


def _prepare_jax_nn(case: Case) -> Any:
    return _per_layer(case, lambda k_BKSH, v_BKSH: (k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)))


def _attend_jax_nn(q_BNH: jax.Array, layer: int, arrays: Any) -> jax.Array:
    items, length_B = arrays
    k_BSKH, v_BSKH = items[layer]
    out = jax.nn.dot_product_attention(q_BNH[:, None], k_BSKH, v_BSKH, key_value_seq_lengths=length_B)
    return out[:, 0]


def _prepare_paged(case: Case) -> Any:
    """k and v pages [K, pages, PAGE, H], a slot's pages one after another, and the page table."""
    K, S, H = (case.cache_LBKSC.shape[2], case.cache_LBKSC.shape[3], case.q_BNH.shape[-1])

    def pages(x_BKSH: jax.Array) -> jax.Array:
        return x_BKSH.swapaxes(0, 1).reshape(K, -1, PAGE, H)

    items, length_B = _per_layer(case, lambda k_BKSH, v_BKSH: (pages(k_BKSH), pages(v_BKSH)))
    return items, length_B, _page_table(len(case.length_B), S)


def _attend_paged_tpu(q_BNH: jax.Array, layer: int, arrays: Any) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    items, length_B, table = arrays
    per_block = min(PAGES_PER_BLOCK, table.shape[1])
    q_BNH = q_BNH * q_BNH.shape[-1] ** -0.5  # it does not scale
    return paged_attention(q_BNH, *items[layer], length_B, table, pages_per_compute_block=per_block)


def _attend_paged_gpu(q_BNH: jax.Array, layer: int, arrays: Any) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    items, length_B, table = arrays
    q_BNH = q_BNH * q_BNH.shape[-1] ** -0.5  # it does not scale
    return paged_attention(q_BNH, *items[layer], table, length_B)


def _prepare_ragged_paged(case: Case) -> Any:
    """Pages [pages, PAGE, 2 K, H], k and v heads in turns."""
    K, S, H = (case.cache_LBKSC.shape[2], case.cache_LBKSC.shape[3], case.q_BNH.shape[-1])

    def pages(k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
        return jnp.stack([k_BKSH, v_BKSH], axis=2).reshape(-1, 2 * K, S, H).swapaxes(1, 2).reshape(-1, PAGE, 2 * K, H)

    items, length_B = _per_layer(case, pages)
    return items, length_B, _page_table(len(case.length_B), S)


def _attend_ragged_paged(q_BNH: jax.Array, layer: int, arrays: Any) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    items, length_B, table = arrays
    B, _, H = q_BNH.shape
    starts = jnp.arange(B + 1, dtype=jnp.int32)  # one query a slot
    return ragged_paged_attention(
        q_BNH, items[layer], length_B, table, starts, jnp.array([B], jnp.int32), sm_scale=H**-0.5
    )


def _page_table(slots: int, cache_length: int, rows: int = PAGE) -> jax.Array:
    """i32[B, pages of a slot]."""
    return jnp.arange(slots * cache_length // rows, dtype=jnp.int32).reshape(slots, -1)
