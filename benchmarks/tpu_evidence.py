"""The tables of docs/tpu-evidence.md, as the TPU compiler tells them today; no TPU needed.

Run as `python -m slipstream.benchmarks.tpu_evidence`, about fifteen minutes on two cores; or with the names of the
tables that are wanted: serving, quantized, designs.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from ..engine_impl.budget import cache_copies
from ..engine_impl.config import EngineConfig
from ..engine_impl.hlo import Program
from ..engine_impl.plan import abstract_engine, plan, shape_of
from .eager import EagerEngine

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
DESIGNS = [("llama-2-7b", 96, 1024), ("llama-3.1-8b", 96, 1024)]


def serving_rows() -> Iterator[str]:
    """What fits, how full it is, and the floor of a step."""
    yield "| model | chips | slots | cache | fits | HBM GiB a chip | floor ms a step | ceiling tokens/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, topology, slots, cache_length in SERVING:
        config = EngineConfig(model=model, slots=slots, cache_length=cache_length)
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
            model=model, slots=slots, cache_length=cache_length, max_prefill_length=256, **of_weights, **of_cache
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
    yield "| model | design | temp MiB a chip | cache-sized copies | static Mcycles |"
    yield "|---|---|---|---|---|"
    for model, slots, cache_length in DESIGNS:
        config = EngineConfig(model=model, slots=slots, cache_length=cache_length)
        lazy = abstract_engine(shape_of(model), topology, config)
        eager = {
            "lazy: one flush a step (ours)": lazy,
            "eager: XLA scatter a layer, every index given": EagerEngine(lazy, "stacked"),
            "eager: XLA scatter a layer, heads as a slice": EagerEngine(lazy, "stacked", scatter="sliced"),
        }
        for design, engine in eager.items():
            compiled = engine.lower_generate().compile()
            memory, hlo = compiled.memory_analysis(), Program(compiled.as_text() or "")
            assert memory is not None
            copies = cache_copies(hlo, engine)
            cells = [f"{memory.temp_size_in_bytes / MIB:,.1f}", str(len(copies)), f"{hlo.estimated_cycles() / 1e6:.1f}"]
            yield "| " + " | ".join([f"{model}, {slots} x {cache_length}", design, *cells]) + " |"


TABLES = {"serving": serving_rows, "quantized": quantized_rows, "designs": design_rows}


def main(names: list[str]) -> None:
    for name in names or TABLES:
        for row in TABLES[name]():
            print(row, flush=True)
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
