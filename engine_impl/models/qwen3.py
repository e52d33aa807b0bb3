"""Qwen3, the dense ones: no biases, but norms on the heads of q and k."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .fields import Fields
from .parts import RMSNorm
from .qwen2 import read_qwen
from .transformer import Attention, GatedMLP, Layer, Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(TransformerConfig):
    """A Qwen3's shape."""


class Qwen3(Transformer):
    """Each head of q and k is normalised before the rope turns it."""

    config_type: ClassVar = Qwen3Config

    def layer(self, config: Any) -> nn.Module:
        return Layer(config, normed_attention(config), GatedMLP(config))

    @classmethod
    def read_config(cls, fields: Fields) -> Qwen3Config:
        fields["head_dim"]  # not model_dim // heads in this family
        return Qwen3Config(**read_qwen(fields))


def normed_attention(config: TransformerConfig) -> Attention:
    """Each head of q and k is normalised, all with the same weights."""
    attention = Attention(config)
    attention.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
    attention.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
    return attention
