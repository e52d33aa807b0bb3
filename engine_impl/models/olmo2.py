"""OLMo 2: a Llama that normalises what comes out of attention and feed-forward, and all heads of q or k together."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .decoder import Attend, LayerOutput
from .fields import Fields
from .parts import WideRMSNorm
from .transformer import Attention, GatedMLP, Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(TransformerConfig):
    """An OLMo 2's shape."""


class HeadsNorm(WideRMSNorm):
    """The root mean square of all heads of a row [R, heads, H] together; one weight for each dimension of each head."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).unflatten(-1, x.shape[-2:])


class PostNormLayer(nn.Module):
    """A layer whose norms stand behind attention and feed-forward, none before."""

    def __init__(self, config: TransformerConfig, self_attn: nn.Module) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.post_attention_layernorm = WideRMSNorm(config.model_dim, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.post_feedforward_layernorm = WideRMSNorm(config.model_dim, config.rms_norm_eps)

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> LayerOutput:
        out_RD, k_RKH, v_RKH = self.self_attn(x_RD, rope, attend)
        x_RD = x_RD + self.post_attention_layernorm(out_RD)
        return LayerOutput(x_RD, self.post_feedforward_layernorm(self.mlp(x_RD)), k_RKH, v_RKH)


class Olmo2(Transformer):
    """The mean over all heads is one over all chips. Copies of kv heads do not change it."""

    config_type: ClassVar = Olmo2Config
    of_kv_heads: ClassVar = (*Transformer.of_kv_heads, "k_norm")

    def __init__(self, config: Olmo2Config) -> None:
        super().__init__(config)
        self.norm = WideRMSNorm(config.model_dim, config.rms_norm_eps)

    def layer(self, config: Any) -> nn.Module:
        attention = Attention(config)
        attention.q_norm = HeadsNorm(config.num_heads * config.head_dim, config.rms_norm_eps)
        attention.k_norm = HeadsNorm(config.num_kv_heads * config.head_dim, config.rms_norm_eps)
        return PostNormLayer(config, attention)

    @classmethod
    def read_config(cls, fields: Fields) -> Olmo2Config:
        fields.only("hidden_act", "silu")
        fields.only("clip_qkv", None)
        shape = read_shape(fields)
        return Olmo2Config(**shape, **read_rope(fields, shape["head_dim"]))
