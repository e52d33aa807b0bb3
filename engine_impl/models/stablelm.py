"""StableLM 3B, StableLM 2 and Stable Code: layer norms with biases; a part of each head turns."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .decoder import split_name
from .fields import Fields
from .parts import LayerNorm
from .transformer import (
    Attention,
    GatedMLP,
    Layer,
    ParallelLayer,
    Transformer,
    TransformerConfig,
    read_rope,
    read_shape,
)


@dataclass(frozen=True, kw_only=True)
class StableLMConfig(TransformerConfig):
    """A StableLM's shape."""

    qkv_bias: bool
    head_norms: bool
    """Whether each head of q and k is normalised, with weights of its own."""
    parallel: bool
    """Whether attention and feed-forward stand side by side."""
    stored_kv_heads: int
    """kv heads of the checkpoint; the module may have copies of them, one for each chip."""


LEFT_OUT = {"partial_rotary_factor": 0.25}
"""Values of fields that a config leaves out, as in transformers' StableLmConfig."""


class StableLM(Transformer):
    """StableLM 2 1.6B has biases on q, k and v; 12B has norms on heads, and layers of parallel parts."""

    config_type: ClassVar = StableLMConfig
    config: StableLMConfig

    def __init__(self, config: StableLMConfig) -> None:
        super().__init__(config)
        self.norm = _norm(config.model_dim, config.rms_norm_eps)

    def layer(self, config: Any) -> nn.Module:
        attention = Attention(config, qkv_bias=config.qkv_bias)
        if config.head_norms:
            attention.q_norm = LayerNorm((config.num_heads, config.head_dim), config.rms_norm_eps)
            attention.k_norm = LayerNorm((config.num_kv_heads, config.head_dim), config.rms_norm_eps)
        if config.parallel:
            return ParallelLayer(_norm(config.model_dim, config.rms_norm_eps), attention, GatedMLP(config))
        return Layer(config, attention, GatedMLP(config), _norm)

    def sources(self, name: str) -> tuple[str, ...]:
        """Checkpoints keep the weights of heads' norms apart."""
        path, module, parameter = split_name(name)
        heads, stored = {
            "q_norm": (self.config.num_heads, self.config.num_heads),
            "k_norm": (self.config.num_kv_heads, self.config.stored_kv_heads),
        }.get(module, (0, 0))
        if not heads:
            return super().sources(name)
        norms = f"{path}{module.replace('norm', 'layernorm')}.norms"
        return tuple(f"{norms}.{i * stored // heads}.{parameter}" for i in range(heads))

    @classmethod
    def read_config(cls, fields: Fields) -> StableLMConfig:
        fields = fields.filled(LEFT_OUT)
        fields.only("hidden_act", "silu")
        fields.only("attention_bias", False)
        shape = read_shape(fields, eps="layer_norm_eps")
        return StableLMConfig(
            **shape,
            **read_rope(fields, shape["head_dim"]),
            qkv_bias=fields.get("use_qkv_bias", False),
            head_norms=fields.get("qk_layernorm", False),
            parallel=fields.get("use_parallel_residual", False),
            stored_kv_heads=shape["num_kv_heads"],
        )


def _norm(dim: int, eps: float) -> LayerNorm:
    return LayerNorm(dim, eps, bias=True)
