"""slipstream plan: what the compiler says of a model on chips that are not here."""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..engine_impl.config import EngineConfig
from ..engine_impl.errors import RefusedError
from .manifest import check_slice, overlay

if TYPE_CHECKING:
    from ..engine_impl.compiler.headroom import Headroom
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
    """Find the most slots that fit, each with room for its longest request, instead of planning for --slots and
    --cache-tokens."""
    lengths: str | None = None
    """Tell how many requests of such lengths the cache holds at once, and their tokens/s ceiling: sharegpt,
    uniform:LOW-HIGH,LOW-HIGH or fixed:PROMPT,ANSWER (prompts, then answers; tokens). sharegpt is log-normal around its
    published means, 161 and 338, each at most 1024."""
    all_buckets: bool = False
    """Compile every program in all its shapes, not only in the largest."""
    dump: Path | None = None
    """Write the optimised HLO of each program there (folder), as <program>.hlo.txt."""
    price: float | None = None
    """What a chip costs (an hour, in any currency): tells what a million tokens cost at the ceiling, that of --lengths
    if they are given."""
    manifest: bool = False
    """Print a kustomization.yaml for deploy/kubernetes/overlays instead of the table, which goes to stderr."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object as the last line of stdout (bytes, ms)."""

    def __post_init__(self) -> None:
        if self.max_slots and self.lengths is not None:
            raise RefusedError("--max-slots and --lengths ask for two plans: leave one of them out")
        if self.price is not None and not (math.isfinite(self.price) and self.price > 0):
            raise RefusedError(f"price={self.price} must be what a chip costs in an hour, more than 0")
        if self.manifest and self.as_json:
            raise RefusedError("--manifest and --json ask for two answers on stdout: leave one of them out")
        if self.manifest:
            check_slice(self.topology)

    def run(self) -> int:
        from ..engine_impl.compiler.budget import Budget
        from ..engine_impl.compiler.chips import chip_of
        from ..engine_impl.compiler.headroom import headroom_of
        from ..engine_impl.compiler.lengths import length_mix
        from ..engine_impl.compiler.plan import abstract_engine, largest_slots, plan, quantization_of, shape_of
        from ..engine_impl.models.registry import use_module

        mix = None if self.lengths is None else length_mix(self.lengths)
        use_module(self.engine.model_module)
        shape, stored = shape_of(self.engine.model), quantization_of(self.engine.model)
        room = None
        if mix is not None:
            engine = abstract_engine(shape, self.topology, self.engine, stored)
            room = headroom_of(Budget(engine, chip_of(self.topology)), mix)
        compute = largest_slots if self.max_slots else plan
        report = compute(
            self.engine,
            shape,
            self.topology,
            stored=stored,
            all_shapes=self.all_buckets,
            dump=self.dump,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        room = room if report.fits else None
        cost = None if self.price is None or not report.fits else cost_of(report, room, self.price)
        if self.as_json:
            more = {"headroom": room and asdict(room), "cost_per_million_tokens": cost}
            print(json.dumps(report.as_json() | more), flush=True)
            return 0 if report.fits else DOES_NOT_FIT
        lines = [table(report), *([] if room is None else ["", *mixed(room)])]
        if cost is not None:
            lines.append(f"A million tokens at that ceiling: {cost:.3g}, with {self.price:g} for a chip's hour")
        print("\n".join(lines), file=sys.stderr if self.manifest else sys.stdout, flush=True)
        if self.manifest and report.fits:
            print(overlay(report, self.engine, "\n".join(headline(report))), end="", flush=True)
        return 0 if report.fits else DOES_NOT_FIT


def headline(plan: "Report") -> list[str]:
    """What was planned, and the memory that it takes."""
    return [
        f"{plan.model}, {plan.dtype}, on {plan.chips} x {plan.topology.split(':')[0]} ({plan.topology}): "
        f"{plan.slots} slots, requests of up to {plan.cache_length:,} tokens, a cache of {plan.cache_tokens:,}",
        f"HBM a chip: weights {plan.weights_bytes_per_chip / GIB:.2f} + cache {plan.cache_bytes_per_chip / GIB:.2f}, "
        f"at most {plan.resident_bytes_per_chip / GIB:.2f} of {plan.hbm_bytes_per_chip / GIB:.2f} GiB",
    ]


def table(plan: "Report") -> str:
    """What a person reads."""
    lines = [
        *headline(plan),
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


def cost_of(plan: "Report", room: "Headroom | None", price: float) -> float:
    """Of a million tokens at the ceiling, of the mix if there is one; `price`: of a chip for an hour."""
    ceiling = plan.programs["generate"].tokens_per_second_ceiling if room is None else room.tokens_per_second_ceiling
    assert ceiling is not None
    return price * plan.chips / 3600 / ceiling * 1e6


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


def mixed(room: "Headroom") -> list[str]:
    """How many requests of a mix decode at once, and how fast they can."""
    bounded = "" if room.running == room.requests else f", of which the slots take {room.running:,}"
    return [
        f"Lengths {room.lengths}: prompts of {room.prompt_tokens:,.0f} tokens, answers of {room.answer_tokens:,.0f}, "
        f"{room.live_tokens:,.0f} in the cache while they decode (means)",
        f"Pool: {room.pool_tokens:,} tokens in pages of {room.page_rows}. Requests at once: {room.requests:,}{bounded} "
        f"(in 1 % of moments the pool is short); {room.whole_requests:,} if each kept room for the longest",
        f"Ceiling: {room.decode_tokens_per_second:,.0f} tokens/s of decoding, {room.step_ms:.2f} ms a step; "
        f"{room.tokens_per_second_ceiling:,.0f} tokens/s with their prompts' multiplications",
    ]
