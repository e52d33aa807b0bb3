"""Which page size keeps the attention kernel bound by HBM, and what a flush costs: the compiler's schedule, no TPU.

    python -m slipstream.benchmarks.compiler.kernel_report --chips v5e --json
    python -m slipstream.benchmarks.compiler.kernel_report --write

Compiles the real kernels with libtpu and counts the VLIW bundles, one a cycle, of each kind of grid step, against the
cycles that the step's bytes take at the chip's full bandwidth. A step takes the larger of the two, since the pipeline
fetches a page while it computes on the one before.

Attention, bundles by kind of step:

    pipeline    of a step that computes nothing: fetching, waiting, storing
    whole       a page full of live rows, the pipeline included
    boundary    the page with the slot's last row, which masks scores and v; the pipeline included
    slot        per slot, on top: the start from the new token, the division at the end
    bound       what a whole step waits for
    cycles      of one layer, for a slot of 1024 tokens, on average over where in a page it ends
    excess      of cycles, over the best page's

Cycles hold the trade-off: a larger page holds more that the slot does not use, half a page on average; a smaller one
pays for the pipeline more often. `--write` puts the smallest page within 5 % of the fewest cycles into the chip's file
in `kernels/ragged_attention/page_sizes/`: what a page does not use is also memory that no other slot gets.

Chunk attention, bundles by kind of step, the pipeline included: `diagonal` the block of queries over itself, the start
of its softmax, `own` over a block of the chunk before it, `cached` over a page. `MXU` is what a page's products take
where the MXUs do nothing else.

Asked for by name (`Setting("scatter", ...)`), not in the command's tables: what XLA makes of a scatter of one layer's
new rows, the way to write them without a kernel of one's own (`eager.py`). It goes through the rows in rounds of
several: fetches their tiles, waits, puts the rows in, sends the tiles back. `ScatterRow.round` is one such round.

Not in it: stalls on VMEM and what latency of a DMA is not hidden. So bundles are a lower bound of compute.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..measure.table import table
from .cores import CORES
from .kernel_rows import FLUSH_LAYERS, LIVE_ROWS, AttentionRow, ChunkRow, FlushRow, Row, Setting, row_bytes, shape_of
from .kernel_schedules import measure
from .page_choice import MOST_EXCESS, choose, excess, write

KV_HEADS, HEAD_DIMS, DTYPES = (1, 4, 8), (64, 128), ("bfloat16", "float32", "int8")  # of the cache's rows
PAGE_BYTES = (64 * 1024, 2 * 1024 * 1024)  # smaller is hopeless, of larger ones two do not fit into v5e's VMEM
PAGE_ROWS = (128, 256, 512, 1024)
CHUNK, CHUNK_PAGE = 512, 256  # tokens of a chunk, rows of the pages that it reads


def settings(all_kv_heads: Iterable[int] = KV_HEADS) -> list[Setting]:
    """All that is compiled for one chip."""
    found = []
    for kv_heads in all_kv_heads:
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                nbytes = row_bytes(kv_heads, head_dim, dtype)
                found += [
                    Setting("attention", kv_heads, head_dim, dtype, rows)
                    for rows in PAGE_ROWS
                    if PAGE_BYTES[0] <= rows * nbytes <= PAGE_BYTES[1]
                ]
                found.append(Setting("chunk", kv_heads, head_dim, dtype, CHUNK_PAGE, tokens=CHUNK))
                found.append(Setting("flush", kv_heads, head_dim, dtype))
        found.append(Setting("scales", kv_heads, 0, "float32"))
    return found


def report(rows: list[Row]) -> str:
    """The tables."""
    attention = [row for row in rows if isinstance(row, AttentionRow)]
    over = excess(attention)
    lines = [
        (
            *shape_of(row), row.setting.page, row.page_bytes // 1024, row.pipeline, row.whole, row.boundary, row.slot,
            row.dma_cycles, "DMA" if row.is_dma_bound else "bundles", row.cycles, f"+{over[row]:.0%}",
        )
        for row in attention
    ]  # fmt: skip
    headers = (
        "chip", "K", "H", "dtype", "page", "KiB", "pipeline", "whole", "boundary", "slot", "DMA", "bound", "cycles",
        "excess",
    )  # fmt: skip
    chosen = [(*shape, page, f"+{over:.0%}") for shape, (page, over) in choose(attention).items()]
    chunks = [
        (
            *shape_of(row),
            row.heads,
            row.block,
            row.pipeline,
            row.diagonal,
            row.own,
            row.cached,
            row.dma_cycles,
            row.mxu_cycles,
        )
        for row in rows
        if isinstance(row, ChunkRow)
    ]
    flush = [(*shape_of(row), row.step, row.dma_cycles) for row in rows if isinstance(row, FlushRow)]
    return "\n\n".join([
        "Attention: bundles per grid step, by rows of a page",
        table(headers, lines),
        f"The smallest page with at most {MOST_EXCESS:.0%} of excess",
        table(("chip", "K", "H", "dtype", "page", "excess"), chosen),
        f"Chunk attention: bundles a grid step, pages of {CHUNK_PAGE} rows",
        table(
            ("chip", "K", "H", "dtype", "heads", "block", "pipeline", "diagonal", "own", "cached", "DMA", "MXU"), chunks
        ),
        f"Flush of one token per slot: bundles per grid step (a tile, {FLUSH_LAYERS} layers)",
        table(("chip", "K", "H", "dtype", "step", "DMA"), flush),
    ])  # fmt: skip


def as_json(rows: list[Row]) -> dict[str, Any]:
    """All rows as plain data."""

    def plain(row: Row) -> dict[str, Any]:
        fields = asdict(row)
        fields |= fields.pop("setting")
        if isinstance(row, AttentionRow):
            return fields | {"is_dma_bound": row.is_dma_bound, "cycles": row.cycles}
        if isinstance(row, ChunkRow):
            return fields
        return {name: value for name, value in fields.items() if name not in ("page", "window", "soft_cap")}

    return {
        "clock_hz": {chip: core.clock for chip, core in CORES.items()},
        "live_rows": LIVE_ROWS,
        "kernels": [plain(row) for row in rows],
        "pages": [
            {"chip": chip, "kv_heads": K, "head_dim": H, "dtype": dtype, "page": page, "excess": round(over, 3)}
            for (chip, K, H, dtype), (page, over) in choose([r for r in rows if isinstance(r, AttentionRow)]).items()
        ],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m slipstream.benchmarks.compiler.kernel_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", default=",".join(CORES), help=f"comma-separated, of {', '.join(CORES)} (all)")
    parser.add_argument("--kv-heads", default=",".join(map(str, KV_HEADS)), help="kv heads a chip, comma-separated")
    parser.add_argument("--write", action="store_true", help="store the chosen page sizes for the kernels to use")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    args = parser.parse_args()
    chips = args.chips.split(",")
    if unknown := set(chips) - set(CORES):
        parser.error(f"--chips {','.join(sorted(unknown))}: there are {', '.join(CORES)}")
    rows = [row for chip in chips for row in measure(chip, settings(map(int, args.kv_heads.split(","))))]
    if args.write:
        for path in write([row for row in rows if isinstance(row, AttentionRow)]):
            print(f"wrote {path}", file=sys.stderr)
    if not args.json:
        print(report(rows), end="\n\n")
    print(json.dumps(as_json(rows)))


if __name__ == "__main__":
    main()
