"""Mistral 7B and its kin: a Llama whose layers all look back over a window."""

from dataclasses import dataclass
from typing import ClassVar

from .fields import Fields
from .transformer import Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class MistralConfig(TransformerConfig):
    """A Mistral's shape."""


LEFT_OUT = 4096
"""The window of a config that does not tell of one, as in transformers' MistralConfig; null is no window."""


class Mistral(Transformer):
    """Later ones (7B v0.2 on, Nemo) have no window."""

    config_type: ClassVar = MistralConfig

    @classmethod
    def read_config(cls, fields: Fields) -> MistralConfig:
        fields.only("hidden_act", "silu")
        fields.only("attention_bias", False)
        shape = read_shape(fields)
        window = fields.unless_left_out("sliding_window", LEFT_OUT)
        return MistralConfig(**shape, **read_rope(fields, shape["head_dim"]), windows=(window,))
