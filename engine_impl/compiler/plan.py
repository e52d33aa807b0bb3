"""Asks the compiler, without a TPU or GPU: does a model fit, what do its programs do, how fast can they be?

The engine's own programs are compiled for a topology by libtpu, or by XLA's GPU compiler, with abstract arguments: no
weights, no chips. What comes back is a fact of the compiler (memory, copies, calls, collectives), or a floor: bytes
that must be read, over the chip's bandwidth.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..assembly import assembled
from ..checkpoints import buckets, hub
from ..checkpoints.contract import Quantization
from ..checkpoints.gguf import GGUFCheckpoint
from ..checkpoints.hf_config import read_fields, read_hf_config
from ..checkpoints.quantization_config import read_format
from ..config import EngineConfig
from ..draft_model import draft_model
from ..engine import Engine
from ..models import registry
from ..models.decoder import ModelConfig
from ..quantization.linear import Int4Linear, Int8ExpertLinear, Int8Linear
from ..quantization.swap import resolved
from ..sizes import longest_text, sized
from ..weights.sharding import make_mesh
from .budget import Budget, Misfit, ProgramReport
from .chips import chip_of
from .lowering import lower_carry, lower_generate, lower_insert, lower_prefill
from .presets import preset
from .topology import devices_of


@dataclass(frozen=True)
class Saving:
    """What quantisation saves, by arithmetic."""

    quantized: str
    """such as "int8 weights and int8 cache" """
    bytes_per_chip: int
    """weights and cache together, against those in `dtype`"""
    slots_unquantized: int
    """the plan's slots_with_room, were nothing quantised"""


@dataclass(frozen=True)
class PlanReport:
    """A model on a topology at a serving shape."""

    model: str
    topology: str
    chips: int
    slots: int
    cache_length: int
    cache_tokens: int
    dtype: str
    hbm_bytes_per_chip: int
    weights_bytes_per_chip: int
    quantize_kv: str
    cache_bytes_per_chip: int
    resident_bytes_per_chip: int
    """the most that is in HBM at once: weights, cache, and the hungriest program's temporaries and results"""
    fits: bool
    programs: dict[str, ProgramReport]
    slots_with_room: int
    """requests of this cache length that the weights leave HBM for, by arithmetic"""
    misfit: Misfit | None = None
    saving: Saving | None = None
    """None where nothing is quantised"""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan(
    config: EngineConfig,
    shape: ModelConfig,
    topology: str,
    *,
    stored: Quantization | None = None,
    all_shapes: bool = False,
    dump: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> PlanReport:
    """Compile generate (of all slots; and where something drafts the widest), insert, prefill (of a whole chunk) and
    carry (of both, where steps carry) for a topology, or each in all its shapes.

    `stored` is how the checkpoint keeps its weights (see `quantization_of`); `dump` gets each program's optimised HLO
    as <program>.hlo.txt; `report` is told what is being compiled.

    Raises RefusedError for a topology that does not exist, sizes that the model does not allow, or without libtpu.
    """
    chip = chip_of(topology)
    engine = abstract_engine(shape, topology, config, stored)
    budget = Budget(engine, chip)
    programs: dict[str, ProgramReport] = {}
    misfit = budget.resident_misfit()
    for program, lower in lowered(engine, all_shapes).items():
        if misfit is not None:
            break
        report(f"compiling {program} for {topology}")
        try:
            start = time.perf_counter()
            compiled = lower().compile()
            programs[program] = budget.report(program, compiled, time.perf_counter() - start)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            misfit = budget.refused(program, str(error))
            break
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{program}.hlo.txt").write_text(compiled.as_text() or "")
        misfit = budget.program_misfit(program, programs[program])
    return PlanReport(
        model=config.model,
        topology=topology,
        chips=engine.mesh.size,
        slots=engine.layout.slots,
        cache_length=engine.layout.length,
        cache_tokens=engine.sizes.cache_tokens,
        dtype=engine.layout.dtype.name,
        hbm_bytes_per_chip=chip.hbm_bytes,
        weights_bytes_per_chip=budget.weights_bytes,
        quantize_kv=config.quantize_kv,
        cache_bytes_per_chip=budget.cache_bytes,
        resident_bytes_per_chip=max((budget.needed(p, r) for p, r in programs.items()), default=budget.resident),
        fits=misfit is None,
        programs=programs,
        slots_with_room=budget.slots_with_room,
        misfit=misfit,
        saving=_saving(config, shape, topology, budget),
    )


def lowered(engine: Engine, all_shapes: bool) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """The programs by name: `generate`, `insert`, `prefill_512`, `carry_256x512` and, where something drafts,
    `generate_32x8`, whose slots have up to 8 tokens each; of all shapes also `generate_8`, `prefill_8x64`,
    `carry_32x256`, `generate_8x4`."""
    chunk = engine.sizes.prefill_chunk
    found = {"generate": lambda: lower_generate(engine), "insert": lambda: lower_insert(engine, 1, chunk)}
    if all_shapes:
        steps = engine.shapes.steps[:-1]
        found |= {f"generate_{slots}": lambda slots=slots: lower_generate(engine, slots) for slots in steps}
    for slots, width in engine.shapes.wide_steps if all_shapes else engine.shapes.wide_steps[-1:]:
        found[f"generate_{slots}x{width}"] = lambda slots=slots, width=width: lower_generate(engine, slots, width)
    for pieces, tokens in engine.shapes.prefills if all_shapes else [(1, chunk)]:
        name = f"prefill_{pieces}x{tokens}" if pieces > 1 else f"prefill_{tokens}"
        found[name] = lambda pieces=pieces, tokens=tokens: lower_prefill(engine, pieces, tokens)
    for slots, tokens in engine.shapes.carries if all_shapes else engine.shapes.carries[-1:]:
        found[f"carry_{slots}x{tokens}"] = lambda slots=slots, tokens=tokens: lower_carry(engine, slots, tokens)
    return found


def _saving(config: EngineConfig, shape: ModelConfig, topology: str, budget: Budget) -> Saving | None:
    modules = {type(module) for module in budget.engine.model.modules()}
    weights = "int4" if Int4Linear in modules else "int8" if modules & {Int8Linear, Int8ExpertLinear} else "none"
    kinds = {"weights": weights, "cache": config.quantize_kv}
    quantized = " and ".join(f"{kind} {what}" for what, kind in kinds.items() if kind != "none")
    if not quantized:
        return None
    plain = replace(config, quantize_weights="none", quantize_activations="none", quantize_kv="none")
    floats = Budget(abstract_engine(shape, topology, plain), budget.chip)
    return Saving(quantized, floats.resident - budget.resident, floats.slots_with_room)


def largest_slots(config: EngineConfig, shape: ModelConfig, topology: str, **options: Any) -> PlanReport:
    """The plan with the most slots that fit, each with the pages of its longest request; with one slot, if not even
    that fits.

    A slot costs its pages and a little more: each guess comes from what a slot cost between the last two plans and the
    room that the best one left, until two neighbours are known of which only the smaller fits.
    """
    engine = abstract_engine(shape, topology, config, options.get("stored"))
    length = engine.layout.length

    def plan_of(slots: int) -> PlanReport:
        sizes = {"slots": slots, "cache_length": length, "cache_tokens": slots * length}
        return plan(replace(config, **sizes), shape, topology, **options)

    best, fails = plan_of(1), None
    if not best.fits:
        return best
    a_slot = best.cache_bytes_per_chip
    while fails is None or fails - best.slots > 1:
        room = best.hbm_bytes_per_chip - best.resident_bytes_per_chip
        guess = best.slots + max(1, room // a_slot)
        guess = guess if fails is None else min(guess, fails - 1)
        tried = plan_of(guess)
        needed = tried.misfit.needed_bytes if tried.misfit else tried.resident_bytes_per_chip
        grown = 2 * a_slot if needed is None else (needed - best.resident_bytes_per_chip) // (guess - best.slots)
        a_slot = max(a_slot, grown)
        best, fails = (tried, fails) if tried.fits else (best, guess)
    return best


def shape_of(model: str) -> ModelConfig:
    """The shape of a preset, a Hugging Face config.json or its folder, a hub id, `embedded`, or a GGUF file.

    Raises RefusedError for what is none of these.
    """
    path = Path(model)
    if model == "embedded":
        return preset("smollm2-135m")
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path).config
    config = _config_file(model)
    return preset(model) if config is None else read_hf_config(config)


def quantization_of(model: str) -> Quantization | None:
    """How the checkpoint of such a model keeps its weights, by its config.json; None: as floats, or as GGUF.

    Raises RefusedError for a quantisation that cannot be read.
    """
    config = None if model == "embedded" or model.endswith(".gguf") else _config_file(model)
    stored = None if config is None else read_format(read_fields(config), str(config))
    return None if stored is None else stored.quantization


def _config_file(model: str) -> Path | None:
    path = Path(model)
    if path.exists():
        return path
    if buckets.is_url(model):
        return buckets.config_file(model)
    return hub.config_file(model) if hub.is_id(model) else None


def abstract_engine(
    shape: ModelConfig, topology: str, config: EngineConfig, stored: Quantization | None = None
) -> Engine:
    """The product's own engine on chips that are not there."""
    devices = devices_of(topology)
    mesh = make_mesh(devices, shape.num_heads, shape.num_kv_heads, config.tensor_parallel)
    model = registry.build(replace(shape, num_kv_heads=max(shape.num_kv_heads, mesh.size)))
    dtype = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    draft = None
    if config.draft_model is not None:
        of_draft, length = shape_of(config.draft_model), config.cache_length or shape.context_length
        draft = draft_model(config, of_draft, quantization_of(config.draft_model), mesh, length)
    config = resolved(config, stored, model, mesh)
    config = sized(config, model.config, mesh, dtype, chip_of(topology).hbm_bytes, draft=draft)
    model = registry.build(model.config.for_length(longest_text(config, model.config)))
    tokenizer: Any = None  # text is none of a program's business
    return assembled(model, mesh, config, dtype, tokenizer, config.model, draft=draft)
