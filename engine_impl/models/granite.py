"""Granite 3: a Llama with four factors, for embeddings, scores, what a layer adds, and logits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .decoder import Anywhere, Attend, LayerOutput
from .fields import Fields
from .parts import Scale
from .transformer import Attention, GatedMLP, Layer, Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(TransformerConfig):
    """A Granite's shape."""

    embedding_multiplier: float
    attention_multiplier: float
    """Scores are scaled by it, instead of H**-0.5."""
    residual_multiplier: float
    """Of what attention and feed-forward add."""
    logits_scaling: float
    """Logits are divided by it."""


class GraniteLayer(Layer):
    """What is added is multiplied first, in float32."""

    def __init__(self, config: GraniteConfig) -> None:
        attention = Attention(config, query_scale=config.attention_multiplier * config.head_dim**0.5)
        super().__init__(config, attention, GatedMLP(config))
        self.multiplier = config.residual_multiplier

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> LayerOutput:
        out_RD, k_RKH, v_RKH = self.self_attn(self.input_layernorm(x_RD), rope, attend)
        x_RD = x_RD + self._scaled(out_RD)
        return LayerOutput(x_RD, self._scaled(self.mlp(self.post_attention_layernorm(x_RD))), k_RKH, v_RKH)

    def _scaled(self, out_RD: Tensor) -> Tensor:
        return (out_RD.float() * self.multiplier).to(out_RD.dtype)


class Granite(Transformer):
    """Factors that a config leaves out are one."""

    config_type: ClassVar = GraniteConfig

    def __init__(self, config: GraniteConfig) -> None:
        super().__init__(config)
        self.after_embedding = Anywhere(Scale(config.embedding_multiplier))
        self.after_logits = Scale(1 / config.logits_scaling)

    def layer(self, config: Any) -> nn.Module:
        return GraniteLayer(config)

    @classmethod
    def read_config(cls, fields: Fields) -> GraniteConfig:
        fields.only("hidden_act", "silu")
        fields.only("position_embedding_type", "rope")
        shape = read_shape(fields)
        return GraniteConfig(
            **shape,
            **read_rope(fields, shape["head_dim"]),
            embedding_multiplier=float(fields.get("embedding_multiplier", 1)),
            attention_multiplier=float(fields.get("attention_multiplier", 1)),
            residual_multiplier=float(fields.get("residual_multiplier", 1)),
            logits_scaling=float(fields.get("logits_scaling", 1)),
        )
