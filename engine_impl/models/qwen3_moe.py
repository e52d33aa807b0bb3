"""Qwen3 with experts, such as Qwen3-30B-A3B: Qwen3's attention, and Mixtral's choice of experts."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .decoder import Transposed, split_name
from .experts import SHARED, MixtureConfig, MixtureOfExperts
from .fields import Fields
from .qwen3 import normed_attention
from .transformer import Layer, Transformer, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(MixtureConfig):
    """A Qwen3's shape; `ffn_dim` is one expert's."""


IN_CHECKPOINTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Qwen3MoE(Transformer):
    """The chips share the experts."""

    config_type: ClassVar = Qwen3MoEConfig
    config: Qwen3MoEConfig
    shard_axis: ClassVar = {**Transformer.shard_axis, **SHARED}

    def layer(self, config: Any) -> nn.Module:
        return Layer(config, normed_attention(config), MixtureOfExperts(config))

    def sources(self, name: str) -> tuple[str, ...]:
        """Checkpoints keep the experts apart."""
        path, module, parameter = split_name(name)
        if module not in IN_CHECKPOINTS:
            return (name,)
        of_expert = f"{IN_CHECKPOINTS[module]}.{parameter}"
        return tuple(Transposed(f"{path}experts.{e}.{of_expert}") for e in range(self.config.num_experts))

    @classmethod
    def read_config(cls, fields: Fields) -> Qwen3MoEConfig:
        fields.only("hidden_act", "silu")
        fields.only("decoder_sparse_step", 1)  # layers have to be alike
        fields.only("mlp_only_layers", [])
        fields["head_dim"]  # not model_dim // heads in this family
        shape = read_shape(fields)
        window = fields["sliding_window"] if fields.get("use_sliding_window", False) else None
        return Qwen3MoEConfig(
            **(shape | {"ffn_dim": fields["moe_intermediate_size"]}),
            **read_rope(fields, shape["head_dim"]),
            windows=(window,),
            num_experts=fields.first("num_experts", "num_local_experts"),
            experts_per_token=fields["num_experts_per_tok"],
            shares_sum_to_one=fields.get("norm_topk_prob", False),
        )
