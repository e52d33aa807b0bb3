"""The KV cache's axes and physical layout: the one place that knows.

One letter per logical axis, used as suffix of every array's name (after Noam Shazeer's shape suffixes):

    L layers   B decode slots   S cache length (rows a slot)   T prompt tokens in a bucket
    N query heads   K kv heads   H head dim   C = 2 H, k and v side by side in one row
    D model dim   F feed-forward dim   V vocabulary;   a digit is a size

The cache is one array of rows, `cache_LBKSC`, left-aligned: row 0 of a slot is its first token. Stored as int8 it has a
second leaf beside its codes, the scales `scale_LBK2S`, of each token's k and v.

- Heads stand outside the tokens, so that a slot's rows of one head are one run of memory: attention reads a block of S
  with one DMA a head, as large as VMEM allows.
- k and v share a row. At head dim 64 a row is then exactly one 128-lane vector: k alone would be padded to twice its
  size or make XLA choose a layout with S minor, which copies the whole cache at every kernel call. At head dim 128 the
  border falls between two vectors and slicing is free. One array also halves the DMAs of a block; a block costs 301
  bundles on v5e, against 358 for two arrays, with 1 head a chip, 513 / 532 with 4, 817 / 790 with 8 (bf16, H = 128).
- The price is paid at the flush: a row is smaller than the tile that memory is written in (8 rows in bf16 and f32, 32
  in int8), so the flush reads, changes and writes one tile a head and slot. On v5e, 96 slots, 32 layers, bf16, H = 128,
  by the bytes: 31, 123 and 246 us a step with 1, 4 and 8 heads a chip. With tokens outside the tile, `[L, B, S, K, C]`,
  it would be one strided DMA a slot, 24 bundles; but each block of attention would cost 6678 bundles instead of 513
  (4 heads) or 4386 instead of 817 (8 heads), and with one bf16 head XLA copies the cache twice.
- Scales have their tokens last: XLA lays f32 [2, S] out in tiles of (2, 128), without a byte of padding, where a
  token's two would be padded to 128 lanes; and a block's scales are rows that multiply scores and weights as they lie.
  One array of [L, B, 2 K, S] would cost attention the same, within 3 bundles. What int8 does to a slot of 1024 tokens
  in a layer on v5e, H = 128, tuned blocks: 936 cycles instead of 1227 with 1 head a chip, 2550 / 4375 with 4, 5050 /
  8738 with 8. With 1 and 4 heads it is the conversion to bf16, not HBM, that a block then waits for. A step's flush
  grows, as its tiles have 32 rows and the scales are a second kernel: 74, 277 and 553 us instead of 31, 123 and 246.

The bundles are the TPU compiler's static schedule, one a cycle, stalls left out:
`benchmarks/compiler/kernel_report.py`.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..kernels.backend import AXIS
from .codec import KV, Codec, Plain

CACHE_SPEC = PartitionSpec(None, None, AXIS, None, None)  # [L, B, K, S, C] and [L, B, K, 2, S]
PREFIX_SPEC = PartitionSpec(None, AXIS, None, None)  # [L, K, T, C] and [L, K, 2, T]


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """The sizes of one cache."""

    layers: int
    slots: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: jnp.dtype
    """the model's, in which keys and values come and the codec `Plain` keeps them"""
    codec: Codec = field(default_factory=Plain)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[L, B, K, S, C], of the rows."""
        return (self.layers, self.slots, self.kv_heads, self.length, 2 * self.head_dim)

    @property
    def bytes(self) -> int:
        """Size over all devices (bytes)."""
        leaves: list[Any] = jax.tree.leaves(self._shapes)
        return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

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
