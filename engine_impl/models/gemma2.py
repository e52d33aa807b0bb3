"""Gemma 2: every other layer has a window, scores and logits are capped, and norms stand before and behind."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .decoder import Attend, LayerOutput
from .fields import Fields
from .gemma import Gemma, read_gemma
from .parts import GemmaRMSNorm, SoftCap, gelu_tanh
from .transformer import Attention, GatedMLP, TransformerConfig, read_rope, windows_of_layers


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(TransformerConfig):
    """A Gemma 2's shape."""

    query_pre_attn_scalar: float
    """Scores are scaled by its inverse root, instead of H**-0.5."""
    logits_soft_cap: float | None
    """Logits become cap * tanh(logit / cap)."""


class SandwichLayer(nn.Module):
    """A layer that normalises what goes into attention and feed-forward, and what comes out."""

    def __init__(self, config: TransformerConfig, self_attn: nn.Module) -> None:
        super().__init__()
        dim, eps = config.model_dim, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(dim, eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = GemmaRMSNorm(dim, eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(dim, eps)
        self.mlp = GatedMLP(config, gelu_tanh)
        self.post_feedforward_layernorm = GemmaRMSNorm(dim, eps)

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> LayerOutput:
        out_RD, k_RKH, v_RKH = self.self_attn(self.input_layernorm(x_RD), rope, attend)
        x_RD = x_RD + self.post_attention_layernorm(out_RD)
        out_RD = self.mlp(self.pre_feedforward_layernorm(x_RD))
        return LayerOutput(x_RD, self.post_feedforward_layernorm(out_RD), k_RKH, v_RKH)


class Gemma2(Gemma):
    """The caps are parts of the family, not of a mode."""

    config_type: ClassVar = Gemma2Config

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        if config.logits_soft_cap is not None:
            self.after_logits = SoftCap(config.logits_soft_cap)

    def layer(self, config: Any) -> nn.Module:
        return SandwichLayer(config, self.attention(config))

    def attention(self, config: Any) -> Attention:
        """With the family's query scale."""
        return Attention(config, query_scale=(config.head_dim / config.query_pre_attn_scalar) ** 0.5)

    @classmethod
    def read_config(cls, fields: Fields) -> Gemma2Config:
        shape = read_gemma2(fields, period=2)
        return Gemma2Config(**shape, **read_rope(fields, shape["head_dim"]))


def read_gemma2(fields: Fields, *, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 describe alike; `period`: of so many layers the last one sees all, where no layer types say
    otherwise."""
    shape = read_gemma(fields)
    by_number = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(shape["num_layers"])]
    return {
        **shape,
        "windows": windows_of_layers(fields, fields.get("layer_types", by_number), fields["sliding_window"]),
        "attn_soft_cap": fields.get("attn_logit_softcapping"),
        "logits_soft_cap": fields.get("final_logit_softcapping"),
        "query_pre_attn_scalar": fields["query_pre_attn_scalar"],
    }
