"""GLM-4: half of each head turns, neighbours against each other; gate and up are one matrix in checkpoints.

`glm` is the first one, a Llama otherwise. `glm4`, of 2025, also normalises what attention and feed-forward give.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .decoder import Attend, LayerOutput, RowRange, split_name
from .fields import Fields
from .parts import RMSNorm
from .transformer import Attention, GatedMLP, Layer, Transformer, TransformerConfig, read_rope, read_shape

LEFT_OUT: dict[str, Any] = {"partial_rotary_factor": 0.5, "attention_bias": True}
"""Values of fields that a config leaves out, as in transformers' GlmConfig and Glm4Config."""


@dataclass(frozen=True, kw_only=True)
class GlmConfig(TransformerConfig):
    """A GLM's shape."""

    qkv_bias: bool
    """Whether q, k and v have biases; the output has none."""


@dataclass(frozen=True, kw_only=True)
class Glm4Config(GlmConfig):
    """That of one of 2025."""


class Glm(Transformer):
    """The fused matrix is taken apart when it is loaded."""

    config_type: ClassVar[type[GlmConfig]] = GlmConfig
    turns_neighbours: ClassVar = True

    def layer(self, config: Any) -> nn.Module:
        return Layer(config, Attention(config, qkv_bias=config.qkv_bias), GatedMLP(config))

    def sources(self, name: str) -> tuple[str, ...]:
        ffn = self.config.ffn_dim
        rows = {"gate_proj": (0, ffn), "up_proj": (ffn, 2 * ffn)}
        path, module, parameter = split_name(name)
        if module not in rows:
            return super().sources(name)
        return (RowRange(f"{path}gate_up_proj.{parameter}", *rows[module]),)

    @classmethod
    def read_config(cls, fields: Fields) -> GlmConfig:
        fields = fields.filled(LEFT_OUT)
        fields.only("hidden_act", "silu")
        shape = read_shape(fields)
        qkv_bias = shape.pop("attention_bias")
        return cls.config_type(**shape, **read_rope(fields, shape["head_dim"]), qkv_bias=qkv_bias)


class Glm4Layer(nn.Module):
    """A layer that normalises what goes into attention and feed-forward, and what comes out."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        dim, eps = config.model_dim, config.rms_norm_eps
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = Attention(config, qkv_bias=config.qkv_bias)
        self.post_self_attn_layernorm = RMSNorm(dim, eps)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp = GatedMLP(config)
        self.post_mlp_layernorm = RMSNorm(dim, eps)

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> LayerOutput:
        out_RD, k_RKH, v_RKH = self.self_attn(self.input_layernorm(x_RD), rope, attend)
        x_RD = x_RD + self.post_self_attn_layernorm(out_RD)
        out_RD = self.mlp(self.post_attention_layernorm(x_RD))
        return LayerOutput(x_RD, self.post_mlp_layernorm(out_RD), k_RKH, v_RKH)


class Glm4(Glm):
    """GLM-4-0414, GLM-Z1."""

    config_type: ClassVar[type[GlmConfig]] = Glm4Config

    def layer(self, config: Any) -> nn.Module:
        return Glm4Layer(config)
