"""Cohere (Command R, Aya): attention and feed-forward side by side, layer norms without biases, scaled logits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .decoder import Pairs, split_name
from .fields import Fields
from .parts import LayerNorm, Scale
from .transformer import Attention, GatedMLP, ParallelLayer, Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class CohereConfig(TransformerConfig):
    """A Cohere's shape."""

    logit_scale: float
    """Logits are multiplied by it."""
    head_norms: bool = False
    """Whether each head of q and k is normalised, with weights of its own."""


LEFT_OUT: dict[str, Any] = {"logit_scale": 0.0625}
"""Values of fields that a config leaves out, as in transformers' CohereConfig and Cohere2Config."""

ITS_OWN: dict[str, Any] = {
    "use_parallel_block": True, "use_gated_activation": True, "rotary_pct": 1.0,
    "position_embedding_type": "rope_gptj", "hidden_act": "silu",
}  # fmt: skip
"""Fields of published configs that could say otherwise, and what they say."""


class Cohere(Transformer):
    """Command R+ normalises heads, Command R does not."""

    config_type: ClassVar = CohereConfig
    turns_neighbours: ClassVar = True
    of_kv_heads: ClassVar = (*Transformer.of_kv_heads, "k_norm")

    def __init__(self, config: CohereConfig) -> None:
        super().__init__(config)
        self.norm = LayerNorm(config.model_dim, config.rms_norm_eps)
        self.after_logits = Scale(config.logit_scale)

    def layer(self, config: Any) -> nn.Module:
        attention = Attention(config)
        if config.head_norms:
            attention.q_norm = LayerNorm((config.num_heads, config.head_dim), config.rms_norm_eps)
            attention.k_norm = LayerNorm((config.num_kv_heads, config.head_dim), config.rms_norm_eps)
        return ParallelLayer(LayerNorm(config.model_dim, config.rms_norm_eps), attention, GatedMLP(config))

    def sources(self, name: str) -> tuple[str, ...]:
        """The weights of heads' norms are in the order of heads, too."""
        if split_name(name)[1] in ("q_norm", "k_norm"):
            return (Pairs(name, self.config.head_dim, self.config.head_dim, axis=1),)
        return super().sources(name)

    @classmethod
    def read_config(cls, fields: Fields) -> CohereConfig:
        shape = read_cohere(fields)
        return CohereConfig(
            **shape, **read_rope(fields, shape["head_dim"]), head_norms=fields.get("use_qk_norm", False)
        )


def read_cohere(fields: Fields) -> dict[str, Any]:
    """What both Coheres describe alike, but for ropes."""
    fields = fields.filled(LEFT_OUT)
    for name, value in ITS_OWN.items():
        fields.only(name, value)
    shape = read_shape(fields, tied_embeddings=True, eps="layer_norm_eps")
    return {**shape, "logit_scale": float(fields["logit_scale"])}
