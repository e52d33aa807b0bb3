"""A model's parameters on their devices, or only their shapes."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import nn

from .errors import RefusedError
from .forward import LayerLoop, Params
from .models.decoder import Decoder, ModelConfig, Rows
from .sharding import parameter_spec


class Checkpoint(Protocol):
    """What a file format offers."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> ModelConfig: ...
    def tensor(self, name: str) -> np.ndarray: ...
    def unused(self, names: set[str]) -> list[str]: ...


def load(model: Decoder, checkpoint: Checkpoint, mesh: Mesh, dtype: jnp.dtype, loop: LayerLoop) -> Params:
    """Read every parameter of the model from the checkpoint, once, and put it on the devices that hold it.

    Raises RefusedError when a tensor is missing, left over or of another shape: weights are never wrong in silence.
    """

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        parts = [_rows(checkpoint.tensor(source), source) for source in model.sources(name)]
        value = parts[0] if len(parts) == 1 else np.stack(parts)
        if name.split(".")[-2] in ("k_proj", "v_proj"):
            value = _repeat_heads(value, checkpoint.config.num_kv_heads, model.config.num_kv_heads)
        if value.shape != shape:
            raise RefusedError(f"{checkpoint.name}: {name} has shape {value.shape}, the model needs {shape}")
        return value.astype(dtype)

    def place(names: list[str], shape: tuple[int, ...], sharding: NamedSharding, stacked: bool) -> jax.Array:
        values = [read(name, shape) for name in names]
        return jax.device_put(np.stack(values) if stacked else values[0], sharding)

    if unused := checkpoint.unused({source for name, _ in model.named_parameters() for source in model.sources(name)}):
        raise RefusedError(f"{checkpoint.name}: the model has no parameter for {', '.join(unused)}")
    return _build(model, mesh, loop, place)


def abstract(model: Decoder, mesh: Mesh, dtype: jnp.dtype, loop: LayerLoop) -> Params:
    """The parameters' shapes, types and shardings, without their memory."""

    def describe(names: list[str], shape: tuple[int, ...], sharding: NamedSharding, stacked: bool):
        return jax.ShapeDtypeStruct((len(names), *shape) if stacked else shape, dtype, sharding=sharding)

    return _build(model, mesh, loop, describe)


def _build(model: Decoder, mesh: Mesh, loop: LayerLoop, leaf: Callable[..., Any]) -> Params:
    """The tree of `forward.Params` with a leaf(parameter names, shape, sharding, stacked) at each place."""

    def section(module: nn.Module, prefixes: list[str], stacked: bool = False) -> dict[str, Any]:
        made = {}
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            spec = parameter_spec(model, f"{prefixes[0]}.{name}", shape, mesh)
            sharding = NamedSharding(mesh, PartitionSpec(None, *spec) if stacked else spec)
            made[name] = leaf([f"{prefix}.{name}" for prefix in prefixes], shape, sharding, stacked)
        return made

    layer_names = [f"layers.{i}" for i in range(len(model.layers))]
    if loop == "scan":
        layers = section(model.layers[0], layer_names, stacked=True)
    else:
        layers = tuple(section(layer, [name]) for layer, name in zip(model.layers, layer_names, strict=True))
    embed_tokens = section(model.embed_tokens, ["embed_tokens"])
    return {
        "embed_tokens": embed_tokens,
        "layers": layers,
        "norm": section(model.norm, ["norm"]),
        "lm_head": embed_tokens if model.config.tied_embeddings else section(model.lm_head, ["lm_head"]),
    }


def _rows(tensor: np.ndarray, source: str) -> np.ndarray:
    """What the model takes of a checkpoint's tensor."""
    return tensor[source.start : source.stop] if isinstance(source, Rows) else tensor


def _repeat_heads(weight: np.ndarray, heads: int, wanted: int) -> np.ndarray:
    """Rows of k or v, each head `wanted / heads` times: with more devices than kv heads, a device's query heads find
    their kv head on the device."""
    if heads == wanted:
        return weight
    by_head = weight.reshape(heads, -1, *weight.shape[1:])
    return by_head.repeat(wanted // heads, axis=0).reshape(-1, *weight.shape[1:])
