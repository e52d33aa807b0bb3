"""The KV cache's axes and physical layout: the one place that knows.

One letter per logical axis, used as suffix of every array's name (after Noam Shazeer's shape suffixes):

    L layers   B decode slots   T tokens of a piece of a text, padded
    N pieces of a prefill, or slots of a step; within a layer N query heads
    P pages of the pool   R rows of a page   J pages of a slot, of its longest request
    K kv heads   H head dim   C = 2 H, k and v side by side in one row
    D model dim   F feed-forward dim   V vocabulary;   a digit is a size

The cache is one array of rows in pages, `cache_LPKRC`. A text's rows are left-aligned over its row of the page table
`page_NJ`: its token s is row s % R of page page_NJ[n, s // R]. Stored as int8 it has a second leaf beside its codes,
the scales `scale_LPK2R`, of each token's k and v. Which page belongs to whom is the host's knowledge (`pages.py`); the
table is an argument of every program that reads or writes the cache.

- A page is what a step of attention reads, and in one layer it is one run of memory: one DMA for all heads. How many
  rows it has is a matter of the chip and of a row's bytes (`tuned_page_rows`). To read several small pages a step costs
  more than one page of their size: with 1 head on v5e 341 bundles for two of 256 rows, 286 for one of 512.
- Layers stand outside the pages. The other way round, a page of all layers would be one run, which helps who moves
  pages between memories; attention costs the same (237 and 497 bundles per page of 256 rows, 1 and 4 heads, on v5e).
- Heads stand outside the rows, so that a head's rows come as whole tiles.
- k and v share a row. At head dim 64 a row is then exactly one 128-lane vector: k alone would be padded to twice its
  size or make XLA choose a layout with R minor, which copies the whole cache at every kernel call. At head dim 128 the
  border falls between two vectors and slicing is free. One array also halves the DMAs of a page.
- The price is paid at the flush: a row is smaller than the tile that memory is written in (8 rows in bf16 and f32, 32
  in int8), so the flush reads, changes and writes one tile per head and slot. On v5e (96 slots, 32 layers, bf16, H =
  128), by the bytes: 31, 123 and 246 us with 1, 4 and 8 heads a chip. With tokens outside the tile, `[..., R, K, C]`,
  it would be one strided DMA per slot, 24 bundles; but each block of attention would cost 6678 bundles instead of 513
  (4 heads) or 4386 instead of 817 (8 heads), and with one bf16 head XLA copies the cache twice.
- Scales have their tokens last: XLA lays f32 [2, R] out in tiles of (2, 128), without a byte of padding, where a
  token's two would be padded to 128 lanes; and a page's scales are rows that multiply scores and weights as they lie.
  With 1 and 4 heads it is the conversion to bf16, not HBM, that a page then waits for. A step's flush grows, as its
  tiles have 32 rows and the scales are a second kernel: 74, 277 and 553 us instead of 31, 123 and 246.

The bundles are the TPU compiler's static schedule, one a cycle, stalls left out:
`benchmarks/compiler/kernel_report.py`.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..kernels import Backend, is_xla, page_rows
from ..kernels.backend import AXIS
from .codec import KV, Codec, Plain

CACHE_SPEC = PartitionSpec(None, None, AXIS, None, None)  # [L, P, K, R, C] and [L, P, K, 2, R]
PREFIX_SPEC = PartitionSpec(None, AXIS, None, None)  # [L, K, T, C] and [L, K, 2, T]


MOST_TABLE_ENTRIES = 16384
"""Of 12 bytes each, for each of up to two cores, in 1 MiB of scalar memory, where the page table has to stand too: 512
KiB of it for 256 slots of 131,072 tokens. Pages of 256 rows make 4 million live tokens."""


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """The sizes of one cache."""

    layers: int
    slots: int
    kv_heads: int
    length: int
    """prompt and answer of the longest request (tokens)"""
    head_dim: int
    dtype: jnp.dtype
    """the model's, in which keys and values come and the codec `Plain` keeps them"""
    page_rows: int
    """tokens of a page"""
    pages: int
    """P: pages of the pool"""
    codec: Codec = field(default_factory=Plain)

    @property
    def pages_per_slot(self) -> int:
        """J: pages of the longest request."""
        return self.pages_for(self.length)

    @property
    def table_entries(self) -> int:
        """Most pages that the tables of one step's slots may have together, shared ones counted for each: they are
        listed in a TPU's scalar memory."""
        return min(self.slots * self.pages_per_slot, MOST_TABLE_ENTRIES)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[L, P, K, R, C], of the rows."""
        return (self.layers, self.pages, self.kv_heads, self.page_rows, 2 * self.head_dim)

    @property
    def bytes(self) -> int:
        """Size over all devices (bytes)."""
        leaves: list[Any] = jax.tree.leaves(self._shapes)
        return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens of one slot."""
        return -(-tokens // self.page_rows)

    def empty(self) -> KV:
        """Zeros."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes)

    def abstract(self, mesh: jax.sharding.Mesh) -> KV:
        """The cache's shapes, types and shardings, without its memory: leaves are jax.ShapeDtypeStruct."""
        cache, _ = self.shardings(mesh)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), self._shapes, cache)

    def shardings(self, mesh: jax.sharding.Mesh) -> tuple[KV, KV]:
        """(of the cache, of a prefix), leaf by leaf: kv heads on the mesh's axis "tensor"."""
        cache, prefix = (jax.NamedSharding(mesh, spec) for spec in (CACHE_SPEC, PREFIX_SPEC))
        return jax.tree.map(lambda _: cache, self._shapes), jax.tree.map(lambda _: prefix, self._shapes)

    @property
    def _shapes(self) -> KV:
        return self.codec.abstract(self.shape, self.dtype)


def tuned_page_rows(
    *,
    kv_heads: int,
    head_dim: int,
    length: int,
    dtype: jnp.dtype,
    codec: Codec,
    mesh: jax.sharding.Mesh,
    backend: Backend,
) -> int:
    """R for a layout of these sizes on the mesh's chips: what was found the best, or a safe size.

    A divisor of `length`, so that a slot's pages hold no more than its longest request.
    """
    stored = codec.abstract((1, 2 * head_dim), dtype).rows.dtype
    device_kind = None if is_xla(backend) else mesh.devices.flat[0].device_kind
    is_native = backend == "native_cpu" and dtype == jnp.float32
    return page_rows(kv_heads // mesh.shape[AXIS], head_dim, length, stored, device_kind, is_native=is_native)
