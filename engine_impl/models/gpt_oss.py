"""gpt-oss: experts with biases and a clamped SwiGLU, attention with sinks, and a window in every other layer."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .decoder import Part, Transposed, split_name
from .experts import SHARED, MixtureConfig, MixtureOfExperts
from .fields import Fields
from .parts import WideRMSNorm
from .transformer import Attention, Layer, Transformer, read_rope, read_shape, windows_of_layers


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(MixtureConfig):
    """A gpt-oss' shape."""

    swiglu_alpha: float = 1.702
    """How steep the gate's sigmoid is."""
    swiglu_limit: float = 7.0
    """What the gate is at most, and what stands beside it at most and, negative, at least."""


LEFT_OUT: dict[str, Any] = {
    "attention_bias": True, "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
}  # fmt: skip
"""Values of fields that a config leaves out, as in transformers' GptOssConfig."""

IN_CHECKPOINTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
STORED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj(?:_(blocks|scales|bias))?")
"""What folders call the tensors of all experts of a layer: floats [E, in, out], MXFP4's two, or biases."""
ODD = slice(1, None, 2)


def clamped_swiglu(gate: Tensor, up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """What goes into an expert's last product."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate * alpha) * (up + 1)


class GptOss(Transformer):
    """A folder has all experts of a layer in one tensor, gate and up in turns; here they go by names of their own."""

    config_type: ClassVar = GptOssConfig
    config: GptOssConfig
    shard_axis: ClassVar = {**Transformer.shard_axis, "self_attn": 0, **SHARED}

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__(config)
        self.norm = WideRMSNorm(config.model_dim, config.rms_norm_eps)

    def layer(self, config: Any) -> nn.Module:
        attention = Attention(config)
        attention.sinks = nn.Parameter(torch.empty(config.num_heads))
        gated = functools.partial(clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit)
        return Layer(config, attention, MixtureOfExperts(config, gated, bias=True), WideRMSNorm)

    @classmethod
    def parts_of(cls, name: str, shape: tuple[int, ...]) -> Mapping[str, Part | None]:
        matched = STORED.fullmatch(name)
        if matched is None:
            return {name: None}
        path, matrix, kind = matched.groups()
        rows_of = {"down": {"down_proj": slice(None)}, "gate_up": {"gate_proj": slice(0, None, 2), "up_proj": ODD}}
        return {
            f"{path}.{e}.{module}.{kind or 'weight'}": Part((e, rows) if kind else (e, slice(None), rows), not kind)
            for e in range(shape[0])
            for module, rows in rows_of[matrix].items()
        }

    def sources(self, name: str) -> tuple[str, ...]:
        path, module, parameter = split_name(name)
        if module == "gate":
            return (f"{path}router.{parameter}",)
        if module not in IN_CHECKPOINTS:
            return (name,)
        names = (f"{path}experts.{e}.{IN_CHECKPOINTS[module]}.{parameter}" for e in range(self.config.num_experts))
        return tuple(names) if parameter == "bias" else tuple(map(Transposed, names))

    @classmethod
    def read_config(cls, fields: Fields) -> GptOssConfig:
        fields = fields.filled(LEFT_OUT)
        fields.only("hidden_act", "silu")
        fields.only("attention_bias", True)
        shape = read_shape(fields)
        by_number = ["full_attention" if i % 2 else "sliding_attention" for i in range(shape["num_layers"])]
        return GptOssConfig(
            **shape,
            **read_rope(fields, shape["head_dim"]),
            windows=windows_of_layers(fields, fields.get("layer_types", by_number), fields["sliding_window"]),
            num_experts=fields.first("num_local_experts", "num_experts"),
            experts_per_token=fields["num_experts_per_tok"],
            swiglu_alpha=float(fields["swiglu_alpha"]),
            swiglu_limit=float(fields["swiglu_limit"]),
        )
