"""slipstream plan: what the compiler says of a model on chips that are not here."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..engine_impl.config import EngineConfig

if TYPE_CHECKING:
    from ..engine_impl.compiler.plan import PlanReport as Report

DOES_NOT_FIT = 1
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Plan:
    """Ask the compiler, without a TPU or GPU: does a model fit, what is the floor of a step, what do its programs do?

    --model takes a preset (llama-2-7b, llama-3.1-8b, ...), a Hugging Face config.json or its folder, a hub id,
    `embedded`, or a GGUF file; no weights are read.
    """

    engine: EngineConfig
    topology: str = "v5e:2x4"
    """TPU generation and slice (chips), such as v5e:2x4, v6e:2x2, v5p:2x2x2, or GPUs of one machine, such as h100:1;
    --tensor-parallel uses a part of it."""
    max_slots: bool = False
    """Find the largest number of slots that fits, instead of planning for --slots."""
    all_buckets: bool = False
    """Compile every program in all its shapes, not only in the largest."""
    dump: Path | None = None
    """Write the optimised HLO of each program there (folder), as <program>.hlo.txt."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object as the last line of stdout (bytes, ms)."""

    def run(self) -> int:
        from ..engine_impl.compiler.plan import largest_slots, plan, quantization_of, shape_of
        from ..engine_impl.models.registry import use_module

        use_module(self.engine.model_module)
        compute = largest_slots if self.max_slots else plan
        report = compute(
            self.engine,
            shape_of(self.engine.model),
            self.topology,
            stored=quantization_of(self.engine.model),
            all_shapes=self.all_buckets,
            dump=self.dump,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(json.dumps(report.as_json()) if self.as_json else table(report), flush=True)
        return 0 if report.fits else DOES_NOT_FIT


def table(plan: "Report") -> str:
    """What a person reads."""
    lines = [
        f"{plan.model}, {plan.dtype}, on {plan.chips} x {plan.topology.split(':')[0]} ({plan.topology}): "
        f"{plan.slots} slots, requests of up to {plan.cache_length:,} tokens, a cache of {plan.cache_tokens:,}",
        f"HBM a chip: weights {plan.weights_bytes_per_chip / GIB:.2f} + cache {plan.cache_bytes_per_chip / GIB:.2f}, "
        f"at most {plan.resident_bytes_per_chip / GIB:.2f} of {plan.hbm_bytes_per_chip / GIB:.2f} GiB",
        *saving(plan),
        "",
        f"{'program':<15}{'compile s':>10}{'temp MiB':>10}{'code MiB':>10}{'copies':>8}{'floor ms':>10}{'compute':>9}",
    ]
    for name, program in plan.programs.items():
        lines.append(
            f"{name:<15}{program.compile_seconds:>10.1f}{program.temp_bytes / MIB:>10.1f}"
            f"{program.code_bytes / MIB:>10.1f}{len(program.cache_sized_copies):>8}{program.floor_ms:>10.2f}"
            f"{program.compute_floor_ms:>9.2f}"
        )
        calls = program.pallas_calls | program.collectives
        lines.append("    " + (", ".join(f"{count} x {call}" for call, count in calls.items()) or "no kernels"))
        lines += [f"    copies the cache: {copy}" for copy in program.cache_sized_copies]
    if plan.misfit is not None:
        return "\n".join([*lines, "", *misfit(plan)])
    ceiling = plan.programs["generate"].tokens_per_second_ceiling
    return "\n".join(
        [*lines, "", f"It fits. Ceiling of the decode step, all slots live and the cache full: {ceiling:,.0f} tokens/s"]
    )


def saving(plan: "Report") -> list[str]:
    """What quantisation gains; no line where nothing is quantised."""
    if plan.saving is None:
        return []
    gained, chip = plan.saving, plan.topology.split(":")[0]
    return [
        f"{gained.quantized}: {gained.bytes_per_chip / GIB:.2f} GiB a chip less than {plan.dtype}; by arithmetic a "
        f"{chip} has room for {plan.slots_with_room:,} instead of {gained.slots_unquantized:,} requests of this length"
    ]


def misfit(plan: "Report") -> list[str]:
    """Why it does not fit, and what would."""
    assert plan.misfit is not None
    why = plan.misfit
    over = "" if why.over_bytes is None else f": {why.over_bytes / GIB:.2f} GiB a chip too much"
    lines = [f"It does not fit. {why.program}{over}."]
    lines += [f"The compiler: {why.compiler}"] if why.compiler else []
    return [*lines, "What would make room, each alone: " + "; ".join(why.remedies)]
