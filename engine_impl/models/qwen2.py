"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: a Llama with biases on q, k and v."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .fields import Fields
from .transformer import (
    Attention,
    GatedMLP,
    Layer,
    Transformer,
    TransformerConfig,
    read_rope,
    read_shape,
    windows_of_layers,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(TransformerConfig):
    """A Qwen2's shape."""


class Qwen2(Transformer):
    """Windows are in the family but in no published config."""

    config_type: ClassVar = Qwen2Config

    def layer(self, config: Any) -> nn.Module:
        return Layer(config, Attention(config, qkv_bias=True), GatedMLP(config))

    @classmethod
    def read_config(cls, fields: Fields) -> Qwen2Config:
        fields.only("attention_bias", False)  # q, k and v have theirs, the output has none
        return Qwen2Config(**read_qwen(fields))


def read_qwen(fields: Fields) -> dict[str, Any]:
    """What Qwen2 and Qwen3 describe alike."""
    fields.only("hidden_act", "silu")
    shape = read_shape(fields)
    return {**shape, **read_rope(fields, shape["head_dim"]), "windows": _windows(fields, shape["num_layers"])}


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """The layers from `max_window_layers` on have one, if `use_sliding_window`: its size may stand there regardless."""
    if not fields.get("use_sliding_window", False):
        return (None,)
    first = fields["max_window_layers"]
    by_number = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return windows_of_layers(fields, fields.get("layer_types", by_number), fields["sliding_window"])
