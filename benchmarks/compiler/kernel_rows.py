"""A kernel's schedule in numbers: bundles of each kind of grid step, beside the cycles of the step's bytes."""

from dataclasses import dataclass
from typing import Any

LIVE_ROWS = 1024
"""Of the slot that `AttentionRow.cycles` is about (tokens)."""
FLUSH_LAYERS = 32
"""That a flush is compiled for (count)."""


@dataclass(frozen=True)
class Setting:
    """One kernel to compile."""

    kernel: str
    """ "attention", of a step; "chunk", of prefill; "flush"; "scales", the flush of an int8 cache's scales; or
    "scatter", XLA's, of one layer"""
    kv_heads: int
    """of one chip"""
    head_dim: int
    dtype: str
    page: int = 0
    """rows of a page, those of a step; attention and chunk only"""
    window: bool = False
    """whether there is one; attention only, as is the cap"""
    soft_cap: float | None = None
    tokens: int = 1
    """W, of a slot in a step; of a chunk, all that it has"""


@dataclass(frozen=True)
class AttentionRow:
    """Bundles of the attention kernel's steps."""

    chip: str
    setting: Setting
    page_bytes: int
    pipeline: int
    whole: int
    boundary: int
    slot: int
    dma_cycles: int

    @property
    def is_dma_bound(self) -> bool:
        """Whether HBM, not the program, decides how long a whole step takes."""
        return self.whole <= self.dma_cycles

    @property
    def cycles(self) -> int:
        """Of one layer, for a slot of LIVE_ROWS tokens, on average over where in a page it ends."""
        boundary = 1 - 1 / self.setting.page  # a slot may end with its page
        whole = (LIVE_ROWS + (self.setting.page - 1) / 2) / self.setting.page - boundary
        return round(
            whole * max(self.whole, self.dma_cycles) + boundary * max(self.boundary, self.dma_cycles) + self.slot
        )


@dataclass(frozen=True)
class FlushRow:
    """Bundles of the flush kernel's step: one tile, FLUSH_LAYERS layers."""

    chip: str
    setting: Setting
    step: int
    dma_cycles: int
    """for the tiles, there and back"""


@dataclass(frozen=True)
class ScatterRow:
    """Bundles of XLA's scatter of one layer's rows."""

    chip: str
    setting: Setting
    rows: int
    """of a round; each is a slot's row of one kv head, whose tile is fetched and sent back by a DMA of its own"""
    round: int
    dma_cycles: int
    """for a round's tiles, there and back"""


@dataclass(frozen=True)
class ChunkRow:
    """Bundles of the chunk attention kernel's steps: of one block of queries, of the kv heads of a step."""

    chip: str
    setting: Setting
    heads: int
    """kv heads of a step"""
    block: int
    """tokens of a block of queries"""
    pipeline: int
    diagonal: int
    own: int
    cached: int
    dma_cycles: int
    """for a page"""
    mxu_cycles: int
    """for a page's products at the chip's peak"""

    def cycles(self, cached: int) -> int:
        """Of a layer, for the whole chunk behind so many cached rows, without the steps in which a block idles."""
        blocks, pages = -(-self.setting.tokens // self.block), -(-cached // self.setting.page)
        of_pages = blocks * pages * max(self.cached, self.dma_cycles)
        one_step = blocks * self.diagonal + blocks * (blocks - 1) // 2 * self.own + of_pages
        return one_step * self.setting.kv_heads // self.heads


Row = AttentionRow | ChunkRow | FlushRow | ScatterRow


def row_bytes(kv_heads: int, head_dim: int, dtype: str) -> int:
    """Of a token in one layer, scales included."""
    return kv_heads * {"bfloat16": 4 * head_dim, "float32": 8 * head_dim, "int8": 2 * head_dim + 8}[dtype]


def shape_of(row: Row) -> tuple[Any, ...]:
    """(chip, kv heads, head dim, dtype)"""
    return row.chip, row.setting.kv_heads, row.setting.head_dim, row.setting.dtype
