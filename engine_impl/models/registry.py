"""The families there are, by the `model_type` of their Hugging Face `config.json`."""

from typing import Any

import torch

from ..errors import RefusedError
from .decoder import Decoder, ModelConfig
from .fields import Fields
from .gemma import Gemma
from .gemma2 import Gemma2
from .gemma3 import Gemma3
from .llama import Llama
from .mistral import Mistral
from .mixtral import Mixtral
from .phi3 import Phi3
from .qwen2 import Qwen2
from .qwen3 import Qwen3

FAMILIES: dict[str, type[Decoder]] = {
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "llama": Llama,
    "mistral": Mistral,
    "mixtral": Mixtral,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
}


def read_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """A `config.json`'s fields as the family's config; `where` names the file in messages.

    Raises RefusedError for a family that is not there, and for what the family cannot do.
    """
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise RefusedError(
            f"{where!r} is of the family {family!r}; the families there are: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[family].read_config(Fields(fields, where))


def build(config: ModelConfig) -> Decoder:
    """The family's module for a config, on the meta device: its values come from a checkpoint."""
    for family in FAMILIES.values():
        if family.config_type is type(config):
            with torch.device("meta"):
                return family(config)
    raise ValueError(f"no family has {type(config).__name__} as its config_type; register it")
