"""What a program needs on one chip and what a chip has: memory, floors, and what would help when it does not fit."""

import math
import re
from dataclasses import dataclass

import jax

from ..engine import Engine
from ..quantization.linear import Int8Linear
from ..sizes import device_bytes
from ..weights.load import matrices
from .chips import Chip
from .hlo import Program

USABLE = 0.98
"""Share of HBM for weights and cache, where only arithmetic is asked: the rest goes to code, temporaries, prefixes."""


@dataclass(frozen=True)
class ProgramReport:
    """What the compiler says of one program; memory is per chip."""

    compile_seconds: float
    argument_bytes: int
    temp_bytes: int
    alias_bytes: int
    code_bytes: int
    output_bytes: int
    cache_bytes: int
    """the KV cache's share of one chip"""
    cache_sized_copies: list[str]
    """HLO instructions that copy at least one layer's k of the cache; empty is right"""
    pallas_calls: dict[str, int]
    collectives: dict[str, int]
    estimated_cycles: int
    hbm_floor_bytes: int
    """what has to cross HBM: for generate the weights and a full cache, for prefill the weights and its own rows, for
    carry the weights once and both"""
    floor_ms: float
    """hbm_floor_bytes over the chip's bandwidth"""
    compute_floor_ms: float
    """multiplications with the weights over the chip's peak: int8's where activations are int8 too, else bf16's"""
    tokens_per_second_ceiling: float | None = None
    """generate only: all slots, at the larger floor"""


@dataclass(frozen=True)
class Misfit:
    """Why it does not fit."""

    program: str
    needed_bytes: int | None
    """per chip; None where the compiler gave up without a number"""
    over_bytes: int | None
    compiler: str | None
    """the compiler's own words, if it was the compiler that refused"""
    remedies: list[str]


class Budget:
    """What one chip has and what is asked of it (bytes)."""

    def __init__(self, engine: Engine, chip: Chip) -> None:
        self.engine, self.chip = engine, chip
        params = engine.parameters.abstract()
        self.weights_bytes = device_bytes(jax.tree.leaves(params))
        models = [params, *([params["draft"]] if "draft" in params else [])]
        untied = [of["embed_tokens"]["weight"] for of in models if of["lm_head"] is not of["embed_tokens"]]
        embedding = device_bytes(untied)
        adapters = device_bytes(jax.tree.leaves(params.get("adapters")))  # read by who uses one
        self.read_bytes = self.weights_bytes - embedding - adapters  # a step gathers a few rows of the embedding
        self.cache_bytes = engine.programs.cache_bytes // engine.mesh.size
        self.resident = self.weights_bytes + self.cache_bytes
        self.row_seconds = 0.0
        """one row through all matrices, the draft model's too, at the chip's peak"""
        for model in (engine.model, *([engine.parameters.draft] if engine.parameters.draft is not None else [])):
            for module, elements in matrices(model, engine.mesh):
                is_int8 = isinstance(module, Int8Linear) and module.rounds_activations
                self.row_seconds += 2 * elements / (chip.int8_ops if is_int8 else chip.bf16_flops)

    @property
    def slots_with_room(self) -> int:
        """Requests of the cache length whose rows, beside the weights, fill the usable HBM: arithmetic, a plan of them
        is the proof."""
        room, layout = int(USABLE * self.chip.hbm_bytes) - self.weights_bytes, self.engine.layout
        return max(0, room * layout.pages // self.cache_bytes // layout.pages_per_slot)

    def report(self, program: str, compiled: jax.stages.Compiled, seconds: float) -> ProgramReport:
        layout, memory, text = self.engine.layout, compiled.memory_analysis(), compiled.as_text()
        assert memory is not None  # libtpu gives both
        assert text is not None
        hlo = Program(text)
        floor_bytes, rows = self._floor(program)
        floor_ms = floor_bytes / self.chip.hbm_bandwidth * 1e3
        compute_ms = rows * self.row_seconds * 1e3
        return ProgramReport(
            compile_seconds=round(seconds, 2),
            argument_bytes=memory.argument_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            cache_bytes=self.cache_bytes,
            cache_sized_copies=cache_copies(hlo, self.engine),
            pallas_calls=hlo.pallas_calls(),
            collectives=hlo.collectives(),
            estimated_cycles=hlo.estimated_cycles(),
            hbm_floor_bytes=floor_bytes,
            floor_ms=floor_ms,
            compute_floor_ms=compute_ms,
            tokens_per_second_ceiling=layout.slots / max(floor_ms, compute_ms) * 1e3 if program == "generate" else None,
        )

    def _floor(self, program: str) -> tuple[int, int]:
        """(bytes that must cross HBM, rows that pass through the weights)."""
        layout = self.engine.layout
        row_bytes = self.cache_bytes // (layout.pages * layout.page_rows)
        name, _, size = program.partition("_")
        sizes = [int(part) for part in size.split("x") if part]
        if name == "insert":
            return 2 * self.engine.sizes.prefill_chunk * row_bytes, 0
        if name == "prefill":
            tokens = math.prod(sizes)
            return self.read_bytes + tokens * row_bytes, tokens
        slots, tokens = (*(sizes or [layout.slots]), 0)[:2]  # of a carry both; of a step its slots, or all of them
        if name == "generate":  # `tokens` of each slot, which read the cache together
            return self.read_bytes + self.cache_bytes, slots * max(1, tokens)
        return self.read_bytes + self.cache_bytes + tokens * row_bytes, slots + tokens

    def needed(self, program: str, report: ProgramReport) -> int:
        """All that is in HBM while the program runs: what it was given or not, weights and cache are there."""
        given = self.cache_bytes if program == "insert" else self.resident
        new = report.temp_bytes + report.code_bytes + report.output_bytes - report.alias_bytes
        return self.resident + max(0, report.argument_bytes - given) + new

    def resident_misfit(self) -> Misfit | None:
        return self._misfit("weights and cache", self.resident)

    def program_misfit(self, program: str, report: ProgramReport) -> Misfit | None:
        return self._misfit(program, self.needed(program, report))

    def _misfit(self, program: str, needed: int) -> Misfit | None:
        over = needed - self.chip.hbm_bytes
        if over <= 0:
            return None
        return Misfit(program, needed, over, None, self._remedies(needed))

    def refused(self, program: str, message: str) -> Misfit:
        """The compiler gives up on a program that alone is too large; it says so in one of two ways."""
        size = r"([\d.]+)([KMGT])"
        needed = None
        if told := re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM", message):
            number, unit = told.group(1, 2) if told[1] else told.group(5, 6)
            needed = int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])
        over = None if needed is None else needed - self.chip.hbm_bytes
        return Misfit(
            program, needed, over, message.splitlines()[0][:300], self._remedies(needed or self.chip.hbm_bytes + 1)
        )

    def _remedies(self, needed: int) -> list[str]:
        """What would bring `needed` bytes a chip down, each alone, by arithmetic; a plan of it is the proof."""
        layout, chips = self.engine.layout, self.engine.mesh.size
        room = self.cache_bytes - (needed - int(USABLE * self.chip.hbm_bytes))  # for the cache
        remedies = []
        if (pages := room * layout.pages // self.cache_bytes) >= 1:
            remedies.append(f"--cache-tokens {pages * layout.page_rows}")
        enough = max(math.ceil(needed * chips / self.chip.hbm_bytes), chips + 1)
        remedies.append(f"at least {enough} of these chips, or chips with more HBM")
        return remedies


def cache_copies(hlo: Program, engine: Engine) -> list[str]:
    """What copies half a layer or more of a leaf of the cache on one chip; see `Program.copies_of`."""
    found = []
    for layout in engine.programs.cache_layouts:
        for leaf in jax.tree.leaves(layout.abstract(engine.mesh)):
            found += hlo.copies_of(leaf.sharding.shard_shape(leaf.shape), device_bytes([leaf]) // layout.layers // 2)
    return found
