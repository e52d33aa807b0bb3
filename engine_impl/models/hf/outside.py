"""transformers' own modules for a `config.json`: built without weights, made ready for being cut."""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import RefusedError
from ..parts import Linear
from . import attention

CHANGING_ROPES = ("dynamic", "longrope")
"""Whose angles transformers computes anew at each step, from the longest text in the batch."""


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def knows(model_type: Any) -> bool:
    """Whether transformers is installed and has a decoder of this type."""
    if not is_installed():
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class Built(NamedTuple):
    """A model of transformers."""

    model: Any
    transposed: frozenset[str]
    """names of its weights that are [in, out] in checkpoints"""


def built(fields: Mapping[str, Any], where: str) -> Built:
    """The model, parameters on the meta device, what follows from its config as it is. Nothing of the checkpoint's own
    code is run.

    Raises RefusedError for what could not be right here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    attention.register()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it advises on attention and on generation
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in CHANGING_ROPES:
            raise RefusedError(
                f"{where!r} has a rope of type {rope['rope_type']}, whose angles change with the text's length: that "
                "is there for families with a module of ours alone"
            )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    model.eval().requires_grad_(False)
    with torch.device("cpu"):
        _fill_constants(model, where)
    return Built(model, _swap_linear(model))


def _ropes(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [parameters, *(inner for inner in parameters.values() if isinstance(inner, dict))]


def _fill_constants(model: Any, where: str) -> None:
    """Buffers that no checkpoint has get their values, as when transformers itself loads one; others become weights."""
    for path, module in model.named_modules():
        left_out = module._non_persistent_buffers_set
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            if name in left_out:
                module._buffers[name] = torch.full(buffer.shape, _unset(buffer.dtype), dtype=buffer.dtype)
            else:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
        if not any(name in left_out for name in module._buffers):
            continue
        with torch.no_grad():
            _owner(model, path)._init_weights(module)
        for name in left_out & set(module._buffers):
            buffer = module._buffers[name]
            if buffer is not None and _is_unset(buffer):
                raise RefusedError(
                    f"{where!r} asks for a {type(module).__name__} whose {name} is not set by its config"
                )


def _owner(model: Any, path: str) -> Any:
    """The innermost model around a module: it knows how to initialise it."""
    owner = model
    for end in (index for index, letter in enumerate(path) if letter == "."):
        part = model.get_submodule(path[:end])
        if hasattr(part, "_init_weights"):
            owner = part
    return owner


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype is torch.bool else torch.iinfo(dtype).min


def _is_unset(buffer: torch.Tensor) -> bool:
    if buffer.dtype is torch.bool:
        return False
    return bool((buffer.isnan() | (buffer == _unset(buffer.dtype))).any())


def _swap_linear(model: nn.Module) -> frozenset[str]:
    """torch's linear modules become those that quantisation and adapters know, and so do GPT-2's, of whose weights the
    names are given: in checkpoints they are [in, out]."""
    from transformers.pytorch_utils import Conv1D

    transposed = set()
    for path, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D):
            continue
        outputs, inputs = module.get_parameter("weight").shape[:: 1 if type(module) is nn.Linear else -1]
        with torch.device("meta"):
            swapped = Linear(inputs, outputs, bias=module.bias is not None).requires_grad_(False)
        if type(module) is nn.Linear:
            swapped.weight = module.weight  # which may be the embedding's too
        else:
            transposed.add(f"{path}.weight")
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, swapped)
    return frozenset(transposed)
