"""Gemma: a Llama with norm weights around one, scaled embeddings and a GeGLU."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .decoder import Anywhere
from .fields import Fields
from .parts import GemmaRMSNorm, Scale, gelu_tanh
from .transformer import Attention, GatedMLP, Layer, Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(TransformerConfig):
    """A Gemma's shape."""


class Gemma(Transformer):
    """The first Gemma, and what the later ones keep of it."""

    config_type: ClassVar = GemmaConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.after_embedding = Anywhere(Scale(config.model_dim**0.5))
        self.norm = GemmaRMSNorm(config.model_dim, config.rms_norm_eps)

    def layer(self, config: Any) -> nn.Module:
        return Layer(config, Attention(config), GatedMLP(config, gelu_tanh), GemmaRMSNorm)

    @classmethod
    def read_config(cls, fields: Fields) -> GemmaConfig:
        shape = read_gemma(fields)
        return GemmaConfig(**shape, **read_rope(fields, shape["head_dim"]))


def read_gemma(fields: Fields) -> dict[str, Any]:
    """What all Gemmas describe alike; their embeddings are tied unless a config says otherwise.

    The first ones were published with `hidden_act: gelu` and mean the tanh approximation.
    """
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    fields.only("use_bidirectional_attention", False)
    fields["head_dim"]  # not model_dim // heads in this family
    return read_shape(fields, tied_embeddings=True)
