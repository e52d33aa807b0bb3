"""The pass over a model that puts quantised modules where its linear ones stood, before any weight is read."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch

import jax.numpy as jnp
from jax.sharding import Mesh
from torch import nn

from ..kernels import Backend
from .config import EngineConfig
from .errors import RefusedError
from .int8_matmul import multiply_floats, multiply_rounded, multiply_split
from .models.decoder import Decoder
from .models.parts import ExpertLinear, Linear
from .quantized_linear import Int4Linear, Int8ExpertLinear, Int8Linear, QuantizedLinear

Swap = Callable[[Linear, int | None], QuantizedLinear]


def quantize(model: Decoder, config: EngineConfig, dtype: jnp.dtype, mesh: Mesh, backend: Backend) -> None:
    """Swaps the model's `Linear` modules for what `config.quantize_weights` says, but for those that
    `config.quantize_exclude` names. An embedding is never swapped, nor an lm_head that is one (tied). Experts become
    int8 with int4 too: their product has no blocks.

    Raises RefusedError for a pattern that names nothing, and for inputs that no block divides.
    """
    if config.quantize_weights == "none":
        return
    swap = _swap_for(config, dtype, mesh, backend)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear | ExpertLinear)}
    if model.config.tied_embeddings:
        linear.pop("lm_head", None)
    for pattern in config.quantize_exclude:
        excluded = [name for name in linear if fnmatch(name, pattern)]
        if not excluded and not fnmatch("lm_head", pattern):
            raise RefusedError(f"quantize_exclude={pattern!r} matches no module; there are: {_kinds(linear)}")
        linear = {name: module for name, module in linear.items() if name not in excluded}
    for name, module in linear.items():
        parent, _, own = name.rpartition(".")
        axis = model.shard_axis.get(own)
        swapped = Int8ExpertLinear(module, axis, mesh) if isinstance(module, ExpertLinear) else swap(module, axis)
        setattr(model.get_submodule(parent), own, swapped)


def _swap_for(config: EngineConfig, dtype: jnp.dtype, mesh: Mesh, backend: Backend) -> Swap:
    if config.quantize_weights == "int8":
        multiply = multiply_split if mesh.devices.flat[0].platform == "cpu" else multiply_floats
        multiply = multiply_rounded if config.quantize_activations == "int8" else multiply
        return lambda module, axis: Int8Linear(module, axis, mesh, multiply=multiply)

    def swap(module: Linear, axis: int | None) -> QuantizedLinear:
        if module.in_features % config.quantize_block:
            raise RefusedError(
                f"quantize_block={config.quantize_block} does not divide a matrix of {module.in_features} inputs; "
                "use a smaller block, int8, or leave it out with --quantize-exclude"
            )
        return Int4Linear(module, axis, mesh, block=config.quantize_block, dtype=dtype, backend=backend)

    return swap


def _kinds(linear: Mapping[str, nn.Module]) -> str:
    """Their names, a layer standing for all."""
    return ", ".join(name for name in linear if not name.startswith("layers.") or name.startswith("layers.0."))
