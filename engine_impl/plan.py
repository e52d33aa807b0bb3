"""Asks the TPU compiler, without a TPU: does a model fit, what do its programs do, how fast can they be?

The engine's own programs are compiled by libtpu for a topology, with abstract arguments: no weights, no chips. What
comes back is a fact of the compiler (memory, copies, calls, collectives), or a floor: bytes that must be read, over the
chip's bandwidth.
"""

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.experimental import topologies

from .checkpoints.gguf import GGUFCheckpoint
from .checkpoints.hf_config import read_hf_config
from .chips import Chip, chip_of
from .config import EngineConfig
from .engine import Engine
from .errors import RefusedError
from .hlo import Program
from .models.llama import Llama, LlamaConfig
from .presets import preset
from .sharding import make_mesh

# libtpu as a compiler only: do not look for a TPU, and let other processes use libtpu beside this one.
COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*", re.DOTALL)


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
    """what has to cross HBM: for generate the weights and a full cache, for prefill the weights and its prefix"""
    floor_ms: float
    """hbm_floor_bytes over the chip's bandwidth"""
    compute_floor_ms: float
    """matrix multiplications with the weights over the chip's bf16 peak"""
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


@dataclass(frozen=True)
class Plan:
    """A model on a topology at a serving shape."""

    model: str
    topology: str
    chips: int
    slots: int
    cache_length: int
    dtype: str
    hbm_bytes_per_chip: int
    weights_bytes_per_chip: int
    cache_bytes_per_chip: int
    resident_bytes_per_chip: int
    """the most that is in HBM at once: weights, cache, and the hungriest program's temporaries and results"""
    fits: bool
    programs: dict[str, ProgramReport]
    misfit: Misfit | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan(
    config: EngineConfig,
    shape: LlamaConfig,
    topology: str,
    *,
    all_buckets: bool = False,
    dump: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile generate, insert and prefill (the largest bucket, or all) for a topology.

    `dump` gets each program's optimised HLO as <program>.hlo.txt; `report` is told what is being compiled.

    Raises RefusedError for a topology that does not exist, sizes that the model does not allow, or without libtpu.
    """
    chip = chip_of(topology)
    engine = abstract_engine(shape, topology, config)
    budget = _Budget(engine, chip)
    programs: dict[str, ProgramReport] = {}
    misfit = budget.resident_misfit()
    buckets = engine.buckets if all_buckets else engine.buckets[-1:]
    lowered = {
        "generate": engine.lower_generate,
        "insert": lambda: engine.lower_insert(engine.buckets[-1]),
        **{f"prefill_{bucket}": lambda bucket=bucket: engine.lower_prefill(bucket) for bucket in buckets},
    }
    for program, lower in lowered.items():
        if misfit is not None:
            break
        report(f"compiling {program} for {topology}")
        try:
            start = time.perf_counter()
            compiled = lower().compile()
            programs[program] = budget.report(program, compiled, time.perf_counter() - start)
        except jax.errors.JaxRuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            misfit = budget.refused(program, str(error))
            break
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{program}.hlo.txt").write_text(compiled.as_text() or "")
        misfit = budget.program_misfit(program, programs[program])
    return Plan(
        model=config.model,
        topology=topology,
        chips=engine.mesh.size,
        slots=config.slots,
        cache_length=config.cache_length,
        dtype=engine.layout.dtype.name,
        hbm_bytes_per_chip=chip.hbm_bytes,
        weights_bytes_per_chip=budget.weights_bytes,
        cache_bytes_per_chip=budget.cache_bytes,
        resident_bytes_per_chip=max((budget.needed(p, r) for p, r in programs.items()), default=budget.resident),
        fits=misfit is None,
        programs=programs,
        misfit=misfit,
    )


def largest_slots(config: EngineConfig, shape: LlamaConfig, topology: str, **options: Any) -> Plan:
    """The plan with the most slots that fit; with one slot, if not even that fits.

    A slot costs its cache and a little more: each guess comes from what a slot cost between the last two plans and the
    room that the best one left, until two neighbours are known of which only the smaller fits.
    """
    best, fails = plan(replace(config, slots=1), shape, topology, **options), None
    if not best.fits:
        return best
    a_slot = best.cache_bytes_per_chip
    while fails is None or fails - best.slots > 1:
        room = best.hbm_bytes_per_chip - best.resident_bytes_per_chip
        guess = best.slots + max(1, room // a_slot)
        guess = guess if fails is None else min(guess, fails - 1)
        tried = plan(replace(config, slots=guess), shape, topology, **options)
        needed = tried.misfit.needed_bytes if tried.misfit else tried.resident_bytes_per_chip
        grown = 2 * a_slot if needed is None else (needed - best.resident_bytes_per_chip) // (guess - best.slots)
        a_slot = max(a_slot, grown)
        best, fails = (tried, fails) if tried.fits else (best, guess)
    return best


def shape_of(model: str) -> LlamaConfig:
    """The shape of a preset, a Hugging Face config.json or its folder, `embedded`, or a GGUF file.

    Raises RefusedError for what is none of these.
    """
    path = Path(model)
    if model == "embedded":
        return preset("smollm2-135m")
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path).config
    return read_hf_config(path) if path.exists() else preset(model)


def abstract_engine(shape: LlamaConfig, topology: str, config: EngineConfig) -> Engine:
    """The product's own engine on chips that are not there."""
    devices = _devices(topology)
    mesh = make_mesh(devices, shape.num_heads, shape.num_kv_heads, config.tensor_parallel)
    with torch.device("meta"):
        model = Llama(replace(shape, num_kv_heads=max(shape.num_kv_heads, mesh.size)))
    dtype = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    tokenizer: Any = None  # text is none of a program's business
    return Engine(model, mesh, config, dtype, tokenizer, config.model)


def _devices(topology: str) -> list[Any]:
    chip_of(topology)
    try:
        import libtpu  # noqa: F401  (JAX's own message, without it, speaks of platforms)
    except ImportError as error:
        raise RefusedError("planning needs the TPU compiler, libtpu; install it: pip install 'jax[tpu]'") from error
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)  # read when libtpu is loaded, by the call below
    jax.config.update("jax_platforms", "cpu")
    return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


class _Budget:
    """What one chip has and what is asked of it (bytes)."""

    def __init__(self, engine: Engine, chip: Chip) -> None:
        self.engine, self.chip = engine, chip
        params = engine.abstract_params()
        arrays = {id(leaf): leaf for leaf in jax.tree.leaves(params)}  # a tied lm_head is one array
        self.weights_bytes = sum(_shard_bytes(leaf) for leaf in arrays.values())
        embedding = 0 if params["lm_head"] is params["embed_tokens"] else _shard_bytes(params["embed_tokens"]["weight"])
        self.read_bytes = self.weights_bytes - embedding  # a step gathers a few rows of the embedding
        self.cache_bytes = _shard_bytes(engine.layout.abstract(engine.mesh))
        self.resident = self.weights_bytes + self.cache_bytes

    def report(self, program: str, compiled: jax.stages.Compiled, seconds: float) -> ProgramReport:
        layout, memory, text = self.engine.layout, compiled.memory_analysis(), compiled.as_text()
        assert memory is not None  # libtpu gives both
        assert text is not None
        hlo = Program(text)
        shard = self.engine.layout.abstract(self.engine.mesh).sharding.shard_shape(layout.shape)
        floor_bytes, rows = self._floor(program)
        floor_ms = floor_bytes / self.chip.hbm_bandwidth * 1e3
        flops = 2 * rows * self.read_bytes // layout.dtype.itemsize
        compute_ms = flops / self.chip.bf16_flops * 1e3
        return ProgramReport(
            compile_seconds=round(seconds, 2),
            argument_bytes=memory.argument_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            cache_bytes=self.cache_bytes,
            cache_sized_copies=hlo.copies_of(shard, self.cache_bytes // layout.layers // 2),
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
        if program == "generate":
            return self.read_bytes + self.cache_bytes, layout.slots
        bucket = int(program.removeprefix("prefill_")) if program != "insert" else self.engine.buckets[-1]
        prefix_bytes = self.cache_bytes * bucket // (layout.slots * layout.length)
        return (2 * prefix_bytes, 0) if program == "insert" else (self.read_bytes + prefix_bytes, bucket)

    def needed(self, program: str, report: ProgramReport) -> int:
        """All that is in HBM while the program runs: what it was given or not, weights and cache are there."""
        given = {"generate": self.resident, "insert": self.cache_bytes}.get(program, self.weights_bytes)
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
        """What would bring `needed` bytes a chip down, each alone, by arithmetic; a plan of it is the proof.

        A fiftieth of HBM is left to code, temporaries and prefixes.
        """
        layout, chips = self.engine.layout, self.engine.mesh.size
        room = self.cache_bytes - (needed - int(0.98 * self.chip.hbm_bytes))  # for the cache
        remedies = []
        if (slots := room * layout.slots // self.cache_bytes) >= 1:
            remedies.append(f"--slots {slots}")
        if (length := room * layout.length // self.cache_bytes // 128 * 128) >= 128:
            remedies.append(f"--cache-length {length}")
        enough = max(math.ceil(needed * chips / self.chip.hbm_bytes), chips + 1)
        remedies.append(f"at least {enough} of these chips, or chips with more HBM")
        return remedies


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    assert array.sharding is not None
    shape = array.sharding.shard_shape(array.shape)
    return math.prod(shape) * jnp.dtype(array.dtype).itemsize
