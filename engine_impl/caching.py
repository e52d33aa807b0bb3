"""How a model's rows are stored, and what reads them: what all device programs rest on.

A baseline overrides the methods behind "The cache".
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from .. import cache_manager
from ..cache_manager import KV, CacheLayout
from ..kernels import Backend
from . import forward
from .attention import Attend, attend_cache, attend_chunk
from .drafting import Propose
from .forward import Decoded, Params, Prefilled
from .models.decoder import Decoder
from .state import PieceBatch, Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Drafting:
    """What a step drafts by."""

    propose: Propose
    model: "Caching | None" = None
    """the draft model's, for what is not found; of the same slots and pages"""


@dataclass(frozen=True, eq=False)
class Caching:
    """One model on one mesh, and its cache."""

    model: Decoder
    mesh: Mesh
    layout: CacheLayout
    backend: Backend
    has_adapters: bool
    """whether slots and pieces carry an adapter's index"""
    drafting: Drafting | None = field(default=None, kw_only=True)
    """None: every step brings one token"""

    @property
    def cache_length(self) -> int:
        """Tokens of a full slot: the cache's rows, at most the model's positions."""
        return min(self.layout.length, self.model.config.context_length)

    def reach_of(self, length: int) -> int:
        """As of the model, and of the draft model where there is one: a length that means the same to both."""
        ours = self.model.config.reach_of(length)
        return ours if self._small is None else max(ours, self._small.reach_of(length))

    @property
    def has_reaches(self) -> bool:
        """Whether texts may differ in their angles."""
        return self.reach_of(sys.maxsize) > 0

    # The cache

    @property
    def cache_layouts(self) -> list[CacheLayout]:
        """Of all that is cached of a token: the model's, and the draft model's."""
        return [self.layout] if self._small is None else [self.layout, self._small.layout]

    @property
    def cache_bytes(self) -> int:
        """Of these, over all devices."""
        return sum(layout.bytes for layout in self.cache_layouts)

    def empty_cache(self) -> KV:
        """Zeros."""
        return self.layout.empty()

    def cache_sharding(self) -> KV:
        """A sharding for each of the cache's arrays."""
        return self.layout.shardings(self.mesh)[0]

    def decode(self, params: Params, cache: KV, rows: Rows, page_NJ: jax.Array) -> Decoded:
        """The model on each slot's last token and its drafts."""
        return forward.decode(self.model, params, rows, self.attend(cache, rows.length_N, page_NJ))

    def prefilled(self, params: Params, cache: KV, pieces: PieceBatch) -> Prefilled:
        """The model on padded pieces; see `forward.prefill`."""
        return forward.prefill(self.model, params, pieces, self._attend_pieces(cache, pieces), self.mesh)

    def store(self, cache: KV, new: Any, length_N: jax.Array, count_N: jax.Array, page_NJ: jax.Array) -> KV:
        """The cache with what `decode` left to be stored, the first `count` rows of each slot."""
        new_LNWKC = new.reshape(new.shape[0], len(length_N), -1, *new.shape[2:])
        return cache_manager.flush(
            cache, new_LNWKC, length_N, count_N, page_NJ, codec=self.layout.codec, mesh=self.mesh, backend=self.backend
        )

    def store_texts(self, cache: KV, kv: KV, page_NJ: jax.Array, start_N: jax.Array, count_N: jax.Array) -> KV:
        """The cache with pieces' rows in their texts' pages."""
        return cache_manager.insert(cache, kv, page_NJ, start_N, count_N)

    # What the programs share

    def attend(self, cache: KV, length_N: jax.Array, page_NJ: jax.Array) -> Attend:
        """How the layers of a decode step attend to texts of these lengths."""
        return attend_cache(cache, length_N, page_NJ, max_pages=self.layout.table_entries, **self._attention)

    def _attend_pieces(self, cache: KV, pieces: PieceBatch) -> Attend:
        where = {"count_N": pieces.count_N, "codec": self.layout.codec}
        return attend_chunk(cache, pieces.start_N, pieces.page_NJ, **where, **self._attention)

    @property
    def _text_sharding(self) -> KV:
        """Of pieces' rows."""
        return self.layout.shardings(self.mesh)[1]

    @property
    def _small(self) -> "Caching | None":
        return None if self.drafting is None else self.drafting.model

    @property
    def _attention(self) -> dict[str, Any]:
        shape = self.model.config
        return {
            "window_of_layer": shape.window_of_layer,
            "soft_cap": shape.attn_soft_cap,
            "mesh": self.mesh,
            "backend": self.backend,
        }
