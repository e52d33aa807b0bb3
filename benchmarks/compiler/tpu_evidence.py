"""The tables of docs/tpu-evidence.md, as the TPU compiler tells them today; no TPU needed.

Run as `python -m slipstream.benchmarks.compiler.tpu_evidence`, about half an hour on two cores; or with the
names of the tables that are wanted: serving, quantized, designs, writes, carried, chunks, wide.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax

from ...engine_impl.compiler.budget import Budget, cache_copies
from ...engine_impl.compiler.chips import chip_of
from ...engine_impl.compiler.hlo import Program
from ...engine_impl.compiler.lowering import lower_carry, lower_generate, lower_prefill
from ...engine_impl.compiler.plan import abstract_engine, plan, shape_of
from ...engine_impl.config import EngineConfig
from ...kernels.cache_flush.pallas_tpu import VMEM_BYTES, layer_group, tile_rows
from ..baselines.eager import eager_twin
from ..measure.table import print_tables
from .cores import CORES
from .kernel_rows import FLUSH_LAYERS, ChunkRow, FlushRow, ScatterRow, Setting
from .kernel_schedules import measure

GIB, MIB = 2**30, 2**20

SERVING = [  # model, topology, slots, cache length
    ("llama-3.2-1b", "v5e:2x2", 128, 2048),
    ("llama-3.2-3b", "v5e:2x2", 64, 2048),
    ("llama-2-7b", "v5e:2x4", 96, 1024),
    ("llama-2-7b", "v5e:2x4", 96, 2048),
    ("llama-2-7b", "v5e:2x4", 96, 4096),
    ("llama-3.1-8b", "v5e:2x4", 128, 2048),
    ("llama-3.1-8b", "v5e:2x4", 256, 2048),
    ("llama-3.1-8b", "v6e:2x2", 128, 2048),
    ("llama-3.1-8b", "v5p:2x2x1", 256, 4096),
    ("llama-2-13b", "v5e:2x4", 48, 2048),
    ("llama-3.1-70b", "v6e:2x4", 64, 2048),
    ("llama-3.1-70b", "v5e:4x4", 64, 2048),
    ("llama-3.1-70b", "v5p:2x2x2", 256, 4096),
]
QUANTIZED = ("llama-3.1-8b", "v5e:2x4", 128, 2048)
WEIGHTS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantize_weights": "int8"},
    "int8, activations too": {"quantize_weights": "int8", "quantize_activations": "int8"},
    "int4, blocks of 32": {"quantize_weights": "int4"},
}
CACHES: dict[str, dict[str, Any]] = {"bfloat16": {}, "int8": {"quantize_kv": "int8"}}
DESIGNS = [("llama-2-7b", 96, 1024), ("llama-3.1-8b", 128, 2048)]
CARRIED = [  # topology, slots, tokens of the piece
    ("v5e:2x4", 32, 256),
    ("v5e:2x4", 32, 512),
    ("v5e:2x4", 128, 256),
    ("v5e:2x4", 128, 512),
    ("v5e:2x4", 256, 512),
    ("v6e:2x4", 128, 512),
]
CHUNKS, BEHIND, CHUNK_SLOTS = (128, 256, 512, 1024, 2048), 8192, 128
"""Tokens of a piece, rows that are cached before it, slots of the step beside it."""
WIDE = [("v5e:2x4", slots, width) for slots in (8, 32) for width in (1, 4, 8)]
"""topology, slots, tokens of each"""


def serving_rows() -> Iterator[str]:
    """What fits, how full it is, and the floor of a step."""
    yield "| model | chips | slots | cache | fits | HBM GiB a chip | floor ms a step | ceiling tokens/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, topology, slots, cache_length in SERVING:
        config = EngineConfig(model=model, slots=slots, cache_length=cache_length, cache_tokens=slots * cache_length)
        report = plan(config, shape_of(model), topology)
        there = f"{report.hbm_bytes_per_chip / GIB:.2f}"
        if report.misfit is not None:
            needed = "?" if report.misfit.needed_bytes is None else f"{report.misfit.needed_bytes / GIB:.2f}"
            row = [f"**no** ({report.misfit.program})", f"{needed} / {there}", "", ""]
        else:
            step = report.programs["generate"]
            used = f"{report.resident_bytes_per_chip / GIB:.2f}"
            row = ["yes", f"{used} / {there}", f"{step.floor_ms:.2f}", f"{step.tokens_per_second_ceiling:,.0f}"]
        yield "| " + " | ".join([model, f"{report.chips} ({topology})", str(slots), str(cache_length), *row]) + " |"


def quantized_rows() -> Iterator[str]:
    """What quantisation makes of a step and of the room."""
    model, topology, slots, cache_length = QUANTIZED
    yield (
        "| weights | cache | HBM GiB a chip | floor ms a step | compute ms | static Mcycles | cache-sized copies "
        "| slots with room |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for (weights, of_weights), (cache, of_cache) in itertools.product(WEIGHTS.items(), CACHES.items()):
        config = EngineConfig(
            model=model,
            slots=slots,
            cache_length=cache_length,
            cache_tokens=slots * cache_length,
            max_prefill_length=256,
            **of_weights,
            **of_cache,
        )
        report = plan(config, shape_of(model), topology)
        step = report.programs["generate"]
        cells = [
            f"{report.resident_bytes_per_chip / GIB:.2f}", f"{step.floor_ms:.2f}", f"{step.compute_floor_ms:.2f}",
            f"{step.estimated_cycles / 1e6:.1f}", str(len(step.cache_sized_copies)), f"{report.slots_with_room:,}",
        ]  # fmt: skip
        yield "| " + " | ".join([weights, cache, *cells]) + " |"


def design_rows(topology: str = "v5e:2x4") -> Iterator[str]:
    """The same step, lazy and eager."""
    yield "| model | design | temp MiB a chip | cache-sized copies | operations a step | static Mcycles |"
    yield "|---|---|---|---|---|---|"
    for model, slots, cache_length in DESIGNS:
        config = EngineConfig(model=model, slots=slots, cache_length=cache_length, cache_tokens=slots * cache_length)
        lazy = abstract_engine(shape_of(model), topology, config)
        eager = {
            "lazy: one flush a step (ours)": lazy,
            "eager: XLA scatter a layer, every index given": eager_twin(lazy, "stacked"),
            "eager: XLA scatter a layer, heads as a slice": eager_twin(lazy, "stacked", scatter="sliced"),
        }
        for design, engine in eager.items():
            compiled = lower_generate(engine).compile()
            memory, hlo = compiled.memory_analysis(), Program(compiled.as_text() or "")
            assert memory is not None
            copies = cache_copies(hlo, engine)
            cells = [
                f"{memory.temp_size_in_bytes / MIB:,.1f}", str(len(copies)), f"{hlo.operations():,}",
                f"{hlo.estimated_cycles() / 1e6:.1f}",
            ]  # fmt: skip
            yield "| " + " | ".join([f"{model}, {slots} x {cache_length}", design, *cells]) + " |"


def write_rows(topology: str = "v5e:2x4") -> Iterator[str]:
    """What storing a step's new tokens takes on each chip: the flush, XLA's scatters, and by arithmetic a kernel that
    writes its own layer's rows, one at a time, while it attends."""
    chip = topology.partition(":")[0]
    core, bandwidth = CORES[chip], chip_of(topology).hbm_bandwidth
    yield "| model | where rows are written | DMAs | MiB over HBM | issuing ms | HBM ms | the longer, of the floor |"
    yield "|---|---|---|---|---|---|---|"
    for model, slots, cache_length in DESIGNS:
        config = EngineConfig(model=model, slots=slots, cache_length=cache_length, cache_tokens=slots * cache_length)
        engine = abstract_engine(shape_of(model), topology, config)
        budget, layout = Budget(engine, chip_of(topology)), engine.layout
        floor_ms = (budget.read_bytes + budget.cache_bytes) / bandwidth * 1e3
        L, K, dtype = layout.layers, layout.kv_heads // engine.mesh.size, layout.dtype
        lanes, rows = layout.shape[-1], L * slots * K
        kinds = [Setting(kernel, K, layout.head_dim, dtype.name) for kernel in ("flush", "scatter")]
        flush, scatter = measure(chip, kinds)
        assert isinstance(flush, FlushRow)
        assert isinstance(scatter, ScatterRow)
        groups = L // layer_group(L, K, lanes, dtype, VMEM_BYTES)
        rounds = L * -(-slots * K // scatter.rows)
        row_bytes = lanes * dtype.itemsize
        ways: dict[str, tuple[int, int, float | None]] = {  # DMAs, bytes, bundles
            "lazy: one flush a step (ours)": (
                2 * slots * groups, 2 * rows * tile_rows(dtype) * row_bytes, flush.step * slots * L / FLUSH_LAYERS
            ),
            "eager: an XLA scatter in each layer": (
                2 * rows, 2 * rows * tile_rows(dtype) * row_bytes, scatter.round * rounds
            ),
            "eager: by the attention kernel itself": (2 * L * slots, 2 * rows * row_bytes, None),
        }  # fmt: skip
        for way, (dmas, moved, bundles) in ways.items():
            hbm_ms = moved / bandwidth * 1e3
            issuing_ms = None if bundles is None else bundles / core.clock * 1e3
            cells = [
                f"{dmas:,}", f"{moved / MIB:.1f}", "" if issuing_ms is None else f"{issuing_ms:.2f}", f"{hbm_ms:.2f}",
                "" if issuing_ms is None else f"{max(issuing_ms, hbm_ms) / floor_ms:.1%}",
            ]  # fmt: skip
            yield "| " + " | ".join([f"{model}, {slots} x {cache_length}", way, *cells]) + " |"


def carried_rows(model: str = "llama-3.1-8b", cache_tokens: int = 65536) -> Iterator[str]:
    """A step and a piece of a prompt, one behind the other and together: what each of the three takes on a chip."""
    yield "| topology | slots | tokens | way | static Mcycles | operations | HBM MiB | floor ms | temp MiB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for topology, slots, tokens in CARRIED:
        config = EngineConfig(model=model, slots=slots, cache_length=2048, cache_tokens=cache_tokens)
        engine = abstract_engine(shape_of(model), topology, config)
        budget = Budget(engine, chip_of(topology))
        ways = {
            "one behind the other": {
                f"generate_{slots}": lower_generate(engine),
                f"prefill_{tokens}": lower_prefill(engine, 1, tokens),
            },
            "together": {f"carry_{slots}x{tokens}": lower_carry(engine, slots, tokens)},
        }
        for way, programs in ways.items():
            compiled = {name: lowered.compile() for name, lowered in programs.items()}
            reports = [budget.report(name, program, 0) for name, program in compiled.items()]
            operations = sum(Program(program.as_text() or "").operations() for program in compiled.values())
            cells = [
                f"{sum(report.estimated_cycles for report in reports) / 1e6:.1f}", f"{operations:,}",
                f"{sum(report.hbm_floor_bytes for report in reports) / MIB:,.0f}",
                f"{sum(max(report.floor_ms, report.compute_floor_ms) for report in reports):.2f}",
                f"{max(report.temp_bytes for report in reports) / MIB:.1f}",
            ]  # fmt: skip
            yield "| " + " | ".join([topology, str(slots), str(tokens), way, *cells]) + " |"


def chunk_rows(model: str = "llama-3.1-8b") -> Iterator[str]:
    """What pieces of a prompt take, alone and as what they add to a step that carries them; attention's bundles are the
    kernel's own."""
    yield (
        "| topology | tokens | way | static Mcycles | attention's, behind 0 / 8,192 rows | a token, thousands "
        "| longest stall, ms | operations | HBM MiB, behind 0 / 8,192 rows |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for topology in ("v5e:2x4", "v6e:2x4"):
        config = EngineConfig(model=model, slots=CHUNK_SLOTS, cache_length=16384, cache_tokens=262144)
        engine = abstract_engine(shape_of(model), topology, config)
        budget, layout, chip = Budget(engine, chip_of(topology)), engine.layout, topology.partition(":")[0]
        heads, dtype, rows = layout.kv_heads // engine.mesh.size, layout.dtype.name, layout.page_rows
        kinds = [Setting("chunk", heads, layout.head_dim, dtype, rows, tokens=tokens) for tokens in CHUNKS]
        row_bytes = budget.cache_bytes // (layout.pages * rows)
        step_cycles, step_operations = _cycles_and_operations(lower_generate(engine, CHUNK_SLOTS))
        for tokens, kernel in zip(CHUNKS, measure(chip, kinds), strict=True):
            assert isinstance(kernel, ChunkRow)
            attention = [layout.layers * kernel.cycles(behind) for behind in (0, BEHIND)]
            reread = -(-tokens // kernel.block) * BEHIND * row_bytes
            alone, together = lower_prefill(engine, 1, tokens), lower_carry(engine, CHUNK_SLOTS, tokens)
            cycles, operations = _cycles_and_operations(alone)
            both_cycles, both_operations = _cycles_and_operations(together)
            weights = budget.read_bytes
            ways = {
                "alone": (cycles, operations, weights),
                "in a step, more": (both_cycles - step_cycles, both_operations - step_operations, 0),
            }
            for way, (static, launched, read) in ways.items():
                totals = [static + of_kernel for of_kernel in attention]
                moved = [read + tokens * row_bytes, read + tokens * row_bytes + reread]
                cells = [
                    f"{static / 1e6:.1f}", " / ".join(f"{cycles / 1e6:.1f}" for cycles in attention),
                    " / ".join(f"{total / tokens / 1e3:.1f}" for total in totals),
                    " / ".join(f"{total / CORES[chip].clock * 1e3:.1f}" for total in totals),
                    f"{launched:,}", " / ".join(f"{nbytes / MIB:,.0f}" for nbytes in moved),
                ]  # fmt: skip
                yield "| " + " | ".join([topology, str(tokens), way, *cells]) + " |"


def _cycles_and_operations(lowered: jax.stages.Lowered) -> tuple[int, int]:
    """The compiler's estimate, which leaves kernels out, and what a chip is started for."""
    hlo = Program(lowered.compile().as_text() or "")
    return hlo.estimated_cycles(), hlo.operations()


def wide_rows(model: str = "llama-3.1-8b") -> Iterator[str]:
    """A step of several tokens a slot, with what drafts them, beside one of one; and that where nothing drafts."""
    yield "| topology | slots | tokens | static Mcycles | operations | floor ms | compute ms | temp MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for topology, slots, width in [*[("v5e:2x4", slots, 0) for slots in (8, 32)], *WIDE]:
        config = EngineConfig(
            model=model, slots=128, cache_length=2048, cache_tokens=262144, speculate="auto" if width else "off"
        )
        engine = abstract_engine(shape_of(model), topology, config)
        budget, program = Budget(engine, chip_of(topology)), f"generate_{slots}x{max(1, width)}"
        compiled = lower_generate(engine, slots, max(1, width)).compile()
        report = budget.report(program, compiled, 0)
        cells = [
            f"{report.estimated_cycles / 1e6:.2f}", f"{Program(compiled.as_text() or '').operations():,}",
            f"{report.floor_ms:.2f}", f"{report.compute_floor_ms:.2f}", f"{report.temp_bytes / MIB:.1f}",
        ]  # fmt: skip
        yield "| " + " | ".join([topology, str(slots), str(width) if width else "1, off", *cells]) + " |"


TABLES = {
    "serving": serving_rows,
    "quantized": quantized_rows,
    "designs": design_rows,
    "writes": write_rows,
    "carried": carried_rows,
    "chunks": chunk_rows,
    "wide": wide_rows,
}


if __name__ == "__main__":
    print_tables(TABLES, sys.argv[1:])
