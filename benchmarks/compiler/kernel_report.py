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
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...engine_impl.compiler.chips import CHIPS
from ...kernels.cache_flush.pallas_tpu import LANES, tile_rows
from ...kernels.ragged_attention.page_sizes import path_of, shape_key, tuned_rows
from ..measure.table import table
from .llo import LloProgram, parse, programs

KV_HEADS, HEAD_DIMS, DTYPES = (1, 4, 8), (64, 128), ("bfloat16", "float32", "int8")  # of the cache's rows
PAGE_BYTES = (64 * 1024, 2 * 1024 * 1024)  # smaller is hopeless, of larger ones two do not fit into v5e's VMEM
PAGE_ROWS = (128, 256, 512, 1024)
CHUNK, CHUNK_PAGE = 512, 256  # tokens of a chunk, rows of the pages that it reads
QUERY_GROUP = 4  # query heads a kv head; up to 8 share a tile of 8 rows
LIVE_ROWS = 1024  # of the slot that `cycles` is about
MOST_EXCESS = 0.05

FLUSH_LAYERS = 32


@dataclass(frozen=True)
class Core:
    """What runs one kernel's grid."""

    topology: str
    clock: float
    """cycles a second: peak bf16 operations over what the MXUs of a core do in a cycle, 2 * 128 * 128 each on four, so
    1.5 GHz on v5e (four MXUs: https://cloud.google.com/tpu/docs/v5e). v4: 1.05 GHz, as in arXiv:2304.01433, table 4.
    v6e: four times as large MXUs, of which the documentation counts two or four; the compiler estimates a 4096**3
    product at 301,616 cycles, which two cannot do, and four at 1.75 GHz make the data sheet's peak."""
    per_device: int
    """cores of a JAX device, which share its HBM and the slots of the grid"""
    delay_slots: int = 4
    """bundles that are issued behind a branch whether it is taken or not"""

    def dma_cycles(self, chip: str, nbytes: int) -> int:
        """Cycles for `nbytes` at this core's share of the bandwidth."""
        return round(nbytes / (CHIPS[chip].hbm_bandwidth / self.per_device) * self.clock)


CORES = {
    "v5e": Core("v5e:2x2", 1.5e9, 1),
    "v6e": Core("v6e:2x2", 1.75e9, 1),
    "v5p": Core("v5p:2x2x1", 1.75e9, 2),
    "v4": Core("v4:2x2x1", 1.05e9, 1, delay_slots=1),
}


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
        """See the module's docstring."""
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


def settings(all_kv_heads: Iterable[int] = KV_HEADS) -> list[Setting]:
    """All that is compiled for one chip."""
    found = []
    for kv_heads in all_kv_heads:
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                row_bytes = _row_bytes(kv_heads, head_dim, dtype)
                found += [
                    Setting("attention", kv_heads, head_dim, dtype, rows)
                    for rows in PAGE_ROWS
                    if PAGE_BYTES[0] <= rows * row_bytes <= PAGE_BYTES[1]
                ]
                found.append(Setting("chunk", kv_heads, head_dim, dtype, CHUNK_PAGE, tokens=CHUNK))
                found.append(Setting("flush", kv_heads, head_dim, dtype))
        found.append(Setting("scales", kv_heads, 0, "float32"))
    return found


def measure(chip: str, wanted: list[Setting]) -> list[Row]:
    """Compile and read kernels for a chip, in a process of its own: libtpu reads its flags when it is loaded.

    Raises RuntimeError with what the process wrote if it fails.
    """
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
        child = subprocess.run(
            [sys.executable, "-m", "slipstream.benchmarks.compiler.kernel_report", "--chips", chip, "--into", dump],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags},
            input=json.dumps([asdict(setting) for setting in wanted]),
            capture_output=True,
            text=True,
        )
    if child.returncode:
        raise RuntimeError(f"compiling for {chip} failed:\n{child.stderr[-4000:]}")
    rows: list[Row] = []
    for line in child.stdout.splitlines():
        fields = json.loads(line)
        fields["setting"] = setting = Setting(**fields["setting"])
        kind = {"attention": AttentionRow, "chunk": ChunkRow, "scatter": ScatterRow}.get(setting.kernel, FlushRow)
        rows.append(kind(**fields))
    return rows


def _row_bytes(kv_heads: int, head_dim: int, dtype: str) -> int:
    return kv_heads * {"bfloat16": 4 * head_dim, "float32": 8 * head_dim, "int8": 2 * head_dim + 8}[dtype]


def _child(chip: str, dump: Path) -> None:
    """Settings on stdin, a row each on stdout; libtpu dumps into `dump`."""
    for setting in [Setting(**fields) for fields in json.load(sys.stdin)]:
        _compile(CORES[chip].topology, setting)
        names = {"attention": "ragged_attention", "chunk": "chunk_attention", "scatter": "scatter_fusion"}
        kernel = names.get(setting.kernel, "cache_flush")
        (text,) = (text for name, text in programs(dump).items() if name.startswith(kernel))
        for path in dump.iterdir():
            path.unlink()
        print(json.dumps(asdict(read(chip, setting, text))), flush=True)


def _compile(topology: str, setting: Setting) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from ...engine_impl.compiler.topology import devices_of
    from ...kernels.cache_flush.pallas_tpu import cache_flush_tpu
    from ...kernels.chunk_attention.pallas_tpu import chunk_attention_tpu
    from ...kernels.ragged_attention.pallas_tpu import ragged_attention_tpu
    from ...kernels.ragged_attention.steps import live_steps
    from ..baselines.eager import scatter_rows

    mesh = Mesh(np.array(devices_of(topology)[:1]), ("tensor",))
    everywhere = PartitionSpec()
    K, H, B, W, rows = setting.kv_heads, setting.head_dim, 96, setting.tokens, jnp.dtype(setting.dtype)
    model = jnp.bfloat16 if setting.dtype == "int8" else rows

    def array(*shape: int, dtype: Any = rows) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, everywhere))

    def attend(q_BWNH, new_BWKC, cache_LPKRC, scale_LPK2R, layer, length_B, page_BJ, window):
        pool, rows = cache_LPKRC.shape[1], cache_LPKRC.shape[3]
        steps = live_steps(length_B, window, page_BJ, rows=rows, max_pages=pool)
        args = (q_BWNH, new_BWKC, cache_LPKRC, scale_LPK2R, layer, length_B, page_BJ, window, None, steps)
        return ragged_attention_tpu(*args, soft_cap=setting.soft_cap)

    layer, slot_B, page_B1 = array(dtype=jnp.int32), array(B, dtype=jnp.int32), array(B, 1, dtype=jnp.int32)
    kernel: Callable[..., jax.Array]
    if setting.kernel == "attention":
        kernel, donated = attend, ()
        J = 2 * PAGE_ROWS[-1] // setting.page
        q_BWNH, new_BWKC = array(B, W, K * QUERY_GROUP, H, dtype=model), array(B, W, K, 2 * H, dtype=model)
        cache_LPKRC = array(2, B * J, K, setting.page, 2 * H)
        scale_LPK2R = array(2, B * J, K, 2, setting.page, dtype=jnp.float32) if setting.dtype == "int8" else None
        window = layer if setting.window else None
        args = q_BWNH, new_BWKC, cache_LPKRC, scale_LPK2R, layer, slot_B, array(B, J, dtype=jnp.int32), window
    elif setting.kernel == "chunk":
        kernel, donated = partial(chunk_attention_tpu, soft_cap=setting.soft_cap), ()
        q_TNH, k_TKH = array(W, K * QUERY_GROUP, H, dtype=model), array(W, K, H, dtype=model)
        cache_LPKRC = array(2, 1024, K, setting.page, 2 * H)
        scale_LPK2R = array(2, 1024, K, 2, setting.page, dtype=jnp.float32) if setting.dtype == "int8" else None
        window, page_MJ = layer if setting.window else None, array(1, 32, dtype=jnp.int32)
        args = q_TNH, k_TKH, k_TKH, cache_LPKRC, scale_LPK2R, layer, array(1, dtype=jnp.int32), page_MJ, window, None
    elif setting.kernel == "scales":
        kernel, donated = partial(cache_flush_tpu, row_axis=4), (0,)
        args = array(FLUSH_LAYERS, B, K, 2, 256), array(FLUSH_LAYERS, B, W, K, 2), slot_B, slot_B, page_B1
    elif setting.kernel == "scatter":
        kernel, donated = scatter_rows, (0,)
        args = array(FLUSH_LAYERS, 4 * B, K, 256, 2 * H), array(B, K, 2 * H), layer, slot_B, slot_B
    else:
        kernel, donated = partial(cache_flush_tpu, row_axis=3), (0,)
        args = array(FLUSH_LAYERS, B, K, 256, 2 * H), array(FLUSH_LAYERS, B, W, K, 2 * H), slot_B, slot_B, page_B1
    sharded = jax.shard_map(kernel, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    jax.jit(sharded, donate_argnums=donated).lower(*args).compile()


def read(chip: str, setting: Setting, text: str) -> Row:
    """A setting's row from its final program."""
    core = CORES[chip]
    row_bytes = _row_bytes(setting.kv_heads, setting.head_dim, setting.dtype)
    if setting.kernel == "scatter":
        program = parse(text, core.delay_slots, loop_of="dma.hbm_to_vmem")
        rows = program.count("dma.vmem_to_hbm")
        dma = core.dma_cycles(chip, 2 * rows * tile_rows(setting.dtype) * row_bytes // setting.kv_heads)
        return ScatterRow(chip, setting, rows, program.issued([]), dma)
    program = parse(text, core.delay_slots)
    if setting.kernel == "chunk":
        return _read_chunk(chip, setting, program)
    if setting.kernel != "attention":
        tile_bytes = setting.kv_heads * 2 * LANES * 4
        if setting.kernel == "flush":  # rows alone: their scales have a flush of their own
            row_values = setting.kv_heads * 2 * setting.head_dim
            tile_bytes = tile_rows(setting.dtype) * row_values * {"bfloat16": 2, "float32": 4, "int8": 1}[setting.dtype]
        dma = core.dma_cycles(chip, 2 * FLUSH_LAYERS * tile_bytes)
        return FlushRow(chip, setting, program.issued(program.regions), dma)
    products = program.of("vmat")
    if len(products) != 2 + (setting.tokens > 1):
        raise ValueError(f"{len(products)} regions with matrix products, not own tokens', a whole page's, a boundary's")
    stages, products = program.stages(), products[-2:]  # one token's products with itself are no matrix products
    return AttentionRow(
        chip,
        setting,
        page_bytes=setting.page * row_bytes,
        pipeline=program.issued(stages),
        whole=program.issued(stages | {products[0]}),
        boundary=program.issued(stages | {products[1]}),
        slot=program.issued(program.regions) - program.issued(stages | set(products)),
        dma_cycles=core.dma_cycles(chip, setting.page * row_bytes),
    )


def _read_chunk(chip: str, setting: Setting, program: LloProgram) -> ChunkRow:
    from ...kernels.chunk_attention.pallas_tpu import block_and_heads

    core, stages = CORES[chip], program.stages()
    products = program.of("vmat")
    if len(products) != 3:
        raise ValueError(f"{len(products)} regions with matrix products, not the diagonal's, a block's and a page's")
    block, heads = block_and_heads(setting.tokens, setting.kv_heads, QUERY_GROUP)
    page_bytes = setting.page * _row_bytes(heads, setting.head_dim, setting.dtype)
    flops = 4 * block * QUERY_GROUP * heads * setting.page * setting.head_dim
    diagonal, own, cached = (program.issued(stages | {region}) for region in products)
    return ChunkRow(
        *(chip, setting, heads, block, program.issued(stages), diagonal, own, cached),
        dma_cycles=core.dma_cycles(chip, page_bytes),
        mxu_cycles=round(flops / (CHIPS[chip].bf16_flops / core.per_device) * core.clock),
    )


def excess(rows: list[AttentionRow]) -> dict[AttentionRow, float]:
    """Each row's cycles over those of the best page for its chip, kv heads, head dim and dtype; 0 for the best."""
    fewest: dict[tuple[Any, ...], int] = {}
    for row in rows:
        fewest[_shape(row)] = min(row.cycles, fewest.get(_shape(row), row.cycles))
    return {row: row.cycles / fewest[_shape(row)] - 1 for row in rows}


def choose(rows: list[AttentionRow]) -> dict[tuple[Any, ...], tuple[int, float]]:
    """By (chip, kv heads, head dim, dtype) the smallest page whose excess is at most MOST_EXCESS, and that excess."""
    near: dict[tuple[Any, ...], dict[int, float]] = {}
    for row, over in excess(rows).items():
        if over <= MOST_EXCESS:
            near.setdefault(_shape(row), {})[row.setting.page] = over
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


def _shape(row: Row) -> tuple[Any, ...]:
    return row.chip, row.setting.kv_heads, row.setting.head_dim, row.setting.dtype


def report(rows: list[Row]) -> str:
    """The tables."""
    attention = [row for row in rows if isinstance(row, AttentionRow)]
    over = excess(attention)
    lines = [
        (
            *_shape(row), row.setting.page, row.page_bytes // 1024, row.pipeline, row.whole, row.boundary, row.slot,
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
            *_shape(row),
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
    flush = [(*_shape(row), row.step, row.dma_cycles) for row in rows if isinstance(row, FlushRow)]
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
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    chips = args.chips.split(",")
    if unknown := set(chips) - set(CORES):
        parser.error(f"--chips {','.join(sorted(unknown))}: there are {', '.join(CORES)}")
    if args.into:
        _child(chips[0], args.into)
        return
    rows = [row for chip in chips for row in measure(chip, settings(map(int, args.kv_heads.split(","))))]
    if args.write:
        for path in write([row for row in rows if isinstance(row, AttentionRow)]):
            print(f"wrote {path}", file=sys.stderr)
    if not args.json:
        print(report(rows), end="\n\n")
    print(json.dumps(as_json(rows)))


if __name__ == "__main__":
    main()
