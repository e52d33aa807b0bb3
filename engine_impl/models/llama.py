"""Llama 2, Llama 3 to 3.3 and what shares their shape: SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama, ..."""

from dataclasses import dataclass
from typing import ClassVar

from .fields import Fields
from .transformer import Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(TransformerConfig):
    """A Llama's shape."""


class Llama(Transformer):
    """The plain transformer."""

    config_type: ClassVar = LlamaConfig

    @classmethod
    def read_config(cls, fields: Fields) -> LlamaConfig:
        fields.only("hidden_act", "silu")
        shape = read_shape(fields)
        return LlamaConfig(**shape, **read_rope(fields, shape["head_dim"]))
