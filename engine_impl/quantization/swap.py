"""The pass over a model that puts quantised modules where its linear ones stood, before any weight is read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from types import MappingProxyType

import jax.numpy as jnp
from jax.sharding import Mesh
from torch import nn

from ...kernels import Backend
from ..checkpoints.contract import WEIGHT, Compact, Quantization
from ..config import EngineConfig
from ..errors import RefusedError
from ..models.decoder import Decoder
from ..models.parts import ExpertLinear, Linear
from .int8_matmul import multiply_floats, multiply_rounded, multiply_split
from .linear import EncodedModule, Int4Linear, Int8ExpertLinear, Int8Linear
from .panels import PanelExperts, PanelLinear, form_of, pack_floats, packs

NOTHING_COMPACT: Mapping[str, Compact] = MappingProxyType({})
Swap = Callable[[Linear, int | None], EncodedModule]
BLOCKS = (128, 64, 32)


def resolved(config: EngineConfig, stored: Quantization | None, model: Decoder, mesh: Mesh) -> EngineConfig:
    """The config with `auto` replaced by what the checkpoint is: weights stay what they are, and so do modules that
    were left as floats.

    Raises RefusedError when they have to become int4 and their groups make no blocks of ours, and when int8 activations
    are wanted of weights that are not int8.
    """
    as_stored = config.quantize_weights == "auto"
    wanted = (stored.weights if stored else "none") if as_stored else config.quantize_weights
    config = replace(config, quantize_weights=wanted)
    if stored is None or wanted != stored.weights:
        return config
    if wanted == "int4":
        config = replace(config, quantize_block=_block(config.quantize_block, stored, model, mesh))
    if not as_stored:
        return config
    return replace(config, quantize_exclude=(*config.quantize_exclude, *_left(stored, model)))


def _left(stored: Quantization, model: Decoder) -> list[str]:
    """Patterns of the modules that were left as floats. All layers run as one program, so they have to be alike."""
    quantized: dict[str, set[bool]] = {}
    for name in _linear(model):
        stored_modules = (source.removesuffix(f".{WEIGHT}") for source in model.sources(f"{name}.{WEIGHT}"))
        quantized.setdefault(_in_all_layers(name), set()).add(not any(map(stored.leaves, stored_modules)))
    for pattern, kinds in quantized.items():
        if len(kinds) > 1:
            raise RefusedError(
                f"{pattern} was quantised to {stored.weights} in some layers and left as it is in others, but layers "
                f"have to be alike; give --quantize-weights {stored.weights}, which quantises it in all, or none"
            )
    return [pattern for pattern, kinds in quantized.items() if kinds == {False}]


def _block(wanted: int | None, stored: Quantization, model: Decoder, mesh: Mesh) -> int:
    """The one wanted, else the largest block within a group that divides all inputs, and leaves the chips whole blocks
    to share. Smaller than the group it is as exact, and costs more scales."""
    remedy = "give --quantize-weights none, which takes them as floats, or int8, which comes close"
    if stored.act_order:
        raise RefusedError(
            f"int4 weights need groups of inputs that lie in order, and these were quantised with desc_act; {remedy}"
        )
    within = [block for block in BLOCKS if stored.group is None or stored.group % block == 0]
    if not within:
        raise RefusedError(
            f"int4 weights need blocks of 32 inputs, and these are in groups of {stored.group}; {remedy}"
        )
    if wanted is not None:
        return wanted
    linear = [(name, module) for name, module in _linear(model).items() if isinstance(module, Linear)]
    inputs = [(module.in_features, model.shard_axis.get(name.rpartition(".")[2]) == 1) for name, module in linear]
    whole = [block for block in within if all(count % block == 0 for count, _ in inputs)]
    shared = [block for block in whole if all(count // block % mesh.size == 0 for count, split in inputs if split)]
    return (shared or whole or within[-1:])[0]


def _linear(model: Decoder) -> dict[str, Linear | ExpertLinear]:
    """What can be swapped."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear | ExpertLinear)}
    if model.config.tied_embeddings:
        linear.pop("lm_head", None)
    return linear


def quantize(
    model: Decoder,
    config: EngineConfig,
    dtype: jnp.dtype,
    mesh: Mesh,
    backend: Backend,
    compact: Mapping[str, Compact] = NOTHING_COMPACT,
) -> None:
    """Swaps the model's `Linear` modules for what `config.quantize_weights` says, but for those that
    `config.quantize_exclude` names. On CPUs with native kernels those become panels of floats (panels.py), and a tied
    embedding becomes panels of floats or, where `lm_head` is not named, of int8. Otherwise an embedding is never
    swapped, nor an lm_head that is one (tied). Experts become int8 with int4 too, for their product has no blocks; on
    those CPUs it has, and they become int8 only where no block divides their inputs. `auto` that was not `resolved` is
    `none`: nothing is known of a checkpoint.

    `compact`: see `Checkpoint.compact`; panels of floats follow it.

    Raises RefusedError for a pattern that names nothing, and for inputs that no block divides.
    """
    if config.quantize_weights in ("int8", "int4"):
        _encode(model, config, dtype, mesh, backend)
    if packs(mesh, backend) and dtype == jnp.float32:
        pack_floats(model, config, mesh, backend, compact)


def _encode(model: Decoder, config: EngineConfig, dtype: jnp.dtype, mesh: Mesh, backend: Backend) -> None:
    swap, of_experts = _swap_for(config, dtype, mesh, backend), _experts_swap_for(config, dtype, mesh, backend)
    linear, excluded = _linear(model), set[str]()
    for pattern in config.quantize_exclude:
        named = {name for name in linear if fnmatch(name, pattern)}
        if not named and not fnmatch("lm_head", pattern):
            raise RefusedError(f"quantize_exclude={pattern!r} matches no module; there are: {_kinds(linear)}")
        if some := {name for name in linear if _in_all_layers(name) in set(map(_in_all_layers, named))} - named:
            raise RefusedError(
                f"quantize_exclude={pattern!r} leaves out a module in some layers, but not {min(some)}; all layers run "
                f"as one program and have to be alike: say {_in_all_layers(min(some))!r}"
            )
        excluded |= named
    for name, module in linear.items():
        if name in excluded:
            continue
        parent, _, own = name.rpartition(".")
        axis = model.shared_axis(own, module.weight.shape, mesh.size)
        swapped = of_experts(module, axis) if isinstance(module, ExpertLinear) else swap(module, axis)
        setattr(model.get_submodule(parent), own, swapped)


def _in_all_layers(name: str) -> str:
    """The pattern of a module in every layer."""
    return re.sub(r"^layers\.\d+\.", "layers.*.", name)


def _experts_swap_for(
    config: EngineConfig, dtype: jnp.dtype, mesh: Mesh, backend: Backend
) -> Callable[[ExpertLinear, int | None], EncodedModule]:
    if not (packs(mesh, backend) and dtype == jnp.float32):
        return lambda module, axis: Int8ExpertLinear(module, axis, mesh)

    def swap(module: ExpertLinear, axis: int | None) -> EncodedModule:
        most = (config.quantize_block or BLOCKS[-1]) if config.quantize_weights == "int4" else 0
        whole = [block for block in BLOCKS if block <= most and module.weight.shape[1] % block == 0]
        form = form_of(config, "int4", whole[0]) if whole else form_of(config, "int8")
        return PanelExperts(module, mesh, form, backend)

    return swap


def _swap_for(config: EngineConfig, dtype: jnp.dtype, mesh: Mesh, backend: Backend) -> Swap:
    is_packed = packs(mesh, backend) and dtype == jnp.float32
    if config.quantize_weights == "int8":
        if is_packed and config.quantize_activations == "none":
            return lambda module, axis: PanelLinear(module, mesh, form_of(config, "int8"), backend)
        multiply = multiply_split if mesh.devices.flat[0].platform == "cpu" else multiply_floats
        multiply = multiply_rounded if config.quantize_activations == "int8" else multiply
        return lambda module, axis: Int8Linear(module, axis, mesh, multiply=multiply)

    block = config.quantize_block or BLOCKS[-1]

    def swap(module: Linear, axis: int | None) -> EncodedModule:
        if module.in_features % block:
            raise RefusedError(
                f"quantize_block={block} does not divide a matrix of {module.in_features} inputs; "
                "use a smaller block, int8, or leave it out with --quantize-exclude"
            )
        if is_packed:
            return PanelLinear(module, mesh, form_of(config, "int4", block), backend)
        return Int4Linear(module, axis, mesh, block=block, dtype=dtype, backend=backend)

    return swap


def _kinds(linear: Mapping[str, nn.Module]) -> str:
    """Their names, a layer standing for all."""
    return ", ".join(name for name in linear if not name.startswith("layers.") or name.startswith("layers.0."))
