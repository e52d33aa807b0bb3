"""Gemma 3: five layers with a window to one without, a rope for each kind, norms on the heads of q and k.

From 4B on they see images too. Their text model is what is served; what sees images is left out."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .fields import Fields
from .gemma2 import Gemma2, Gemma2Config, SandwichLayer, read_gemma2
from .parts import GemmaRMSNorm
from .two_ropes import TwoRopes, read_two_ropes


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(TwoRopes, Gemma2Config):
    """A Gemma 3's shape; `rope_theta`, `rope_factors` and `rope_scale` are those of layers that see all."""


WITH_IMAGES = "gemma3"
"""The `model_type` of configs that describe the text model in their `text_config`."""

LEFT_OUT: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}
"""What the `text_config` of google/gemma-3-4b, -12b or -27b leaves out: the defaults of the class that they were
published for, Gemma3TextConfig in transformers' models/gemma3/configuration_gemma3.py."""


class Gemma3(Gemma2):
    """Each head of q and k is normalised before the rope turns it."""

    config_type: ClassVar = Gemma3Config
    prefixes: ClassVar = ("model.language_model.", "language_model.model.", "language_model.", "model.")
    """With images since transformers 5; with images as published (the third is the head's); without."""
    ignored: ClassVar = ("vision_tower.", "multi_modal_projector.")

    def layer(self, config: Any) -> nn.Module:
        attention = self.attention(config)
        attention.q_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps)
        attention.k_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps)
        return SandwichLayer(config, attention)

    @classmethod
    def read_config(cls, fields: Fields) -> Gemma3Config:
        if fields.get("model_type") == WITH_IMAGES:
            # Transformers reads whether embeddings are tied beside the text_config, and writes it in both places.
            fields = fields.part("text_config", LEFT_OUT, beside=["tie_word_embeddings"])
        fields.only("attn_logit_softcapping", None)  # a field that transformers reads and does not use
        shape = read_gemma2(fields, period=fields.get("sliding_window_pattern", 6))
        # Configs of before transformers 5 give layers with a window a theta of their own and no scaling.
        return Gemma3Config(**shape, **read_two_ropes(fields, shape["head_dim"], local_theta="rope_local_base_freq"))
