"""Which page size is best, and where that is written: the smallest that costs little more than the best one."""

import json
from pathlib import Path
from typing import Any

from ...kernels.ragged_attention.page_sizes import path_of, shape_key, tuned_rows
from .cores import CORES
from .kernel_rows import AttentionRow, shape_of

MOST_EXCESS = 0.05
"""Cycles of a page that is chosen, beyond the best one's (share)."""


def excess(rows: list[AttentionRow]) -> dict[AttentionRow, float]:
    """Each row's cycles over those of the best page for its chip, kv heads, head dim and dtype; 0 for the best."""
    fewest: dict[tuple[Any, ...], int] = {}
    for row in rows:
        fewest[shape_of(row)] = min(row.cycles, fewest.get(shape_of(row), row.cycles))
    return {row: row.cycles / fewest[shape_of(row)] - 1 for row in rows}


def choose(rows: list[AttentionRow]) -> dict[tuple[Any, ...], tuple[int, float]]:
    """By (chip, kv heads, head dim, dtype) the smallest page whose excess is at most MOST_EXCESS, and that excess."""
    near: dict[tuple[Any, ...], dict[int, float]] = {}
    for row, over in excess(rows).items():
        if over <= MOST_EXCESS:
            near.setdefault(shape_of(row), {})[row.setting.page] = over
    return {shape: min(pages.items()) for shape, pages in near.items()}


def write(rows: list[AttentionRow]) -> list[Path]:
    """Put what `choose` finds into the chips' files; sizes of other shapes stay in them. Returns the files."""
    from ...engine_impl.compiler.topology import devices_of

    written = []
    for chip in dict.fromkeys(row.chip for row in rows):
        device_kind = devices_of(CORES[chip].topology)[0].device_kind
        chosen = choose([row for row in rows if row.chip == chip])
        sizes = {shape_key(K, H, dtype): page for (_, K, H, dtype), (page, _) in chosen.items()}
        path = path_of(device_kind)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(sorted((tuned_rows(device_kind) | sizes).items())), indent=2) + "\n")
        written.append(path)
    return written
