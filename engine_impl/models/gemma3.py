"""Gemma 3, text only: five layers with a window to one without, a rope for each kind, norms on the heads of q and k."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .fields import Fields
from .gemma2 import Gemma2, Gemma2Config, SandwichLayer, read_gemma2
from .parts import GemmaRMSNorm
from .rope import Rope, frequencies, read_factors


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """A Gemma 3's shape; `rope_theta` and `rope_factors` are those of layers that see all."""

    local_rope_theta: float
    """Of layers with a window."""

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        return tuple(0 if window is None else 1 for window in self.window_of_layer)


class Gemma3(Gemma2):
    """Each head of q and k is normalised before the rope turns it."""

    config_type: ClassVar = Gemma3Config

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config)
        self.rope = Rope(
            frequencies(config.head_dim, config.rope_theta, config.rope_factors),
            frequencies(config.head_dim, config.local_rope_theta),
        )

    def layer(self, config: Any) -> nn.Module:
        attention = self.attention(config)
        attention.q_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps)
        attention.k_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps)
        return SandwichLayer(config, attention)

    @classmethod
    def read_config(cls, fields: Fields) -> Gemma3Config:
        fields.only("attn_logit_softcapping", None)  # a field that transformers reads and does not use
        shape = read_gemma2(fields, period=fields.get("sliding_window_pattern", 6))
        if fields.get("rope_parameters") is not None:
            every, local = (
                fields.rope(("default", "linear"), layer_type="full_attention"),
                fields.rope(("default",), layer_type="sliding_attention"),
            )
        else:
            every, local = fields.rope(("default", "linear")), {"rope_theta": fields["rope_local_base_freq"]}
        return Gemma3Config(
            **shape,
            rope_theta=float(every["rope_theta"]),
            rope_factors=read_factors(fields, every, shape["head_dim"]),
            local_rope_theta=float(local["rope_theta"]),
        )
