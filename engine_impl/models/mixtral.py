"""Mixtral: a Mistral whose feed-forward is a choice of experts, for each token anew."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .decoder import Transposed
from .experts import SHARED, MixtureConfig, MixtureOfExperts
from .fields import Fields
from .transformer import Attention, Layer, Transformer, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(MixtureConfig):
    """A Mixtral's shape."""


class Mixtral(Transformer):
    """The chips share the experts."""

    config_type: ClassVar = MixtralConfig
    config: MixtralConfig
    shard_axis: ClassVar = {**Transformer.shard_axis, **SHARED}

    def layer(self, config: Any) -> nn.Module:
        return Layer(config, Attention(config), MixtureOfExperts(config))

    def sources(self, name: str) -> tuple[str, ...]:
        """Checkpoints keep the experts apart, under `block_sparse_moe`."""
        layer, _, parameter = name.partition(".mlp.")
        if not parameter:
            return (name,)
        if parameter == "gate.weight":
            return (f"{layer}.block_sparse_moe.{parameter}",)
        experts = (f"{layer}.block_sparse_moe.experts.{e}.{parameter}" for e in range(self.config.num_experts))
        return tuple(Transposed(name) for name in experts)

    @classmethod
    def read_config(cls, fields: Fields) -> MixtralConfig:
        fields.only("hidden_act", "silu")
        fields.only("attention_bias", False)
        shape = read_shape(fields)
        return MixtralConfig(
            **shape,
            **read_rope(fields, shape["head_dim"]),
            windows=(fields.get("sliding_window"),),
            num_experts=fields["num_local_experts"],
            experts_per_token=fields["num_experts_per_tok"],
        )
