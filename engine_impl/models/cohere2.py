"""Cohere 2 (Command R7B, Command A): attention and feed-forward side by side; layers that see all have no rope."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .fields import Fields
from .parts import LayerNorm, Scale
from .transformer import (
    Attention,
    GatedMLP,
    ParallelLayer,
    Transformer,
    TransformerConfig,
    read_rope,
    read_shape,
    windows_of_layers,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cohere2Config(TransformerConfig):
    """A Cohere 2's shape."""

    logit_scale: float
    """Logits are multiplied by it."""


LEFT_OUT: dict[str, Any] = {"sliding_window_pattern": 4, "logit_scale": 0.0625}
"""Values of fields that a config leaves out, as in transformers' Cohere2Config."""

ITS_OWN: dict[str, Any] = {
    "use_parallel_block": True, "use_qk_norm": False, "use_gated_activation": True, "use_parallel_embedding": False,
    "rotary_pct": 1.0, "position_embedding_type": "rope_gptj", "hidden_act": "silu",
}  # fmt: skip
"""Fields of published configs that could say otherwise, and what they say."""


class Cohere2(Transformer):
    """Norms are layer norms without biases."""

    config_type: ClassVar = Cohere2Config
    turns_neighbours: ClassVar = True

    def __init__(self, config: Cohere2Config) -> None:
        super().__init__(config)
        self.norm = LayerNorm(config.model_dim, config.rms_norm_eps)
        self.after_logits = Scale(config.logit_scale)

    def layer(self, config: Any) -> nn.Module:
        norm = LayerNorm(config.model_dim, config.rms_norm_eps)
        return ParallelLayer(norm, Attention(config), GatedMLP(config))

    @classmethod
    def read_config(cls, fields: Fields) -> Cohere2Config:
        fields = fields.filled(LEFT_OUT)
        for name, value in ITS_OWN.items():
            fields.only(name, value)
        shape = read_shape(fields, tied_embeddings=True, eps="layer_norm_eps")
        every = fields["sliding_window_pattern"]
        by_number = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(shape["num_layers"])]
        window = fields.unless_left_out("sliding_window", 4096)
        windows = windows_of_layers(fields, fields.get("layer_types", by_number), window)
        return Cohere2Config(
            **shape,
            **read_rope(fields, shape["head_dim"]),
            windows=windows,
            without_rope=tuple(window is None for window in windows),
            logit_scale=float(fields["logit_scale"]),
        )
