"""The families there are, by the `model_type` of their Hugging Face `config.json`; docs/adding-a-model.md adds one."""

import importlib
import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

import torch

from ..errors import RefusedError
from .cohere import Cohere
from .cohere2 import Cohere2
from .decoder import Decoder, ModelConfig
from .field_kinds import check_kinds, shown
from .fields import Fields
from .gemma import Gemma
from .gemma2 import Gemma2
from .gemma3 import Gemma3
from .glm4 import Glm, Glm4
from .gpt_oss import GptOss
from .granite import Granite
from .hf import family as hf_family
from .hf import outside
from .hf.family import HFDecoder
from .llama import Llama
from .mistral import Mistral
from .mixtral import Mixtral
from .olmo2 import Olmo2
from .olmo3 import Olmo3
from .phi3 import Phi3
from .qwen2 import Qwen2
from .qwen3 import Qwen3
from .qwen3_moe import Qwen3MoE
from .smollm3 import SmolLM3
from .stablelm import StableLM
from .unread import check_unread

log = logging.getLogger(__name__)

FAMILIES: dict[str, type[Decoder]] = {
    "cohere": Cohere,
    "cohere2": Cohere2,
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3": Gemma3,
    "gemma3_text": Gemma3,
    "glm": Glm,
    "glm4": Glm4,
    "gpt_oss": GptOss,
    "granite": Granite,
    "llama": Llama,
    "mistral": Mistral,
    "mixtral": Mixtral,
    "olmo2": Olmo2,
    "olmo3": Olmo3,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3MoE,
    "smollm3": SmolLM3,
    "stablelm": StableLM,
}

NOT_THERE = {
    "deepseek_v2": "its cache holds one compressed vector for a token instead of keys and values (MLA)",
    "deepseek_v3": "its cache holds one compressed vector for a token instead of keys and values (MLA)",
}
"""Families that are asked for, and why they are missing. docs/models.md lists them."""

ENTRY_POINTS = "slipstream.models"
"""The group in which an installed package names the modules of its families, each by its model type."""

AnyDecoder = TypeVar("AnyDecoder", bound=type[Decoder])


def register(model_type: str) -> Callable[[AnyDecoder], AnyDecoder]:
    """A class decorator for a family from outside. Raises ValueError when another one has the name already."""

    def add(family: AnyDecoder) -> AnyDecoder:
        there = FAMILIES.setdefault(model_type, family)
        if there is not family:
            raise ValueError(f"{model_type=} is {there.__module__}.{there.__name__} already; choose another name")
        return family

    return add


def use_module(name: str | None) -> None:
    """Import a module that registers families of its own. Raises RefusedError when it cannot be imported."""
    if name is None:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise RefusedError(f"model_module={name!r} cannot be imported ({error}); is it on PYTHONPATH?") from error


def read_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """A `config.json`'s fields as the family's config; `where` names the file in messages.

    Raises RefusedError for a family that is not there, and for what the family cannot do.
    """
    check_kinds(fields, where)
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        for entry_point in entry_points(group=ENTRY_POINTS, name=str(model_type)):
            entry_point.load()
    family = FAMILIES.get(str(model_type))
    if family is None and (model_type in NOT_THERE or not outside.knows(model_type)):
        why = f", which is not there: {NOT_THERE[model_type]}" if model_type in NOT_THERE else ""
        raise RefusedError(
            f"{where!r} is of the family {model_type!r}{why}; the families there are: {', '.join(sorted(FAMILIES))}; "
            f"--model-module brings one of your own{_more()}"
        )
    asked = Fields(fields, where)
    try:
        if family is None:
            return hf_family.read_config(fields, where)
        config = family.read_config(asked)
        if unknown := check_unread(asked):
            log.info("%s has fields that nobody reads here: %s", where, ", ".join(map(shown, unknown)))
        return config
    except RefusedError:
        raise
    except Exception as error:  # fields that make no sense together, in ways that no list tells
        raise RefusedError(
            f"{where!r} cannot be read as {model_type} ({type(error).__name__}: {str(error)[:200]}); fetch it anew"
        ) from error


def _more() -> str:
    if outside.is_installed():
        return ""
    return "; pip install 'slipstream-llm[hf]' brings more, which transformers computes"


def build(config: ModelConfig) -> Decoder:
    """The family's module for a config, on the meta device: its values come from a checkpoint."""
    with torch.device("meta"):
        return family_of(config)(config)


def family_of(config: ModelConfig) -> type[Decoder]:
    """The family whose config it is. Raises ValueError when there is none."""
    for family in (*FAMILIES.values(), HFDecoder):
        if family.config_type is type(config):
            return family
    raise ValueError(f"no family has {type(config).__name__} as its config_type; register it")
