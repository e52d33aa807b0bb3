"""Mixtral: a Mistral whose feed-forward is a choice of experts, for each token anew."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fields import Fields
from .parts import ExpertLinear, Linear
from .transformer import Attention, Layer, Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(TransformerConfig):
    """A Mixtral's shape; `ffn_dim` is one expert's."""

    num_experts: int
    experts_per_token: int


class MixtureOfExperts(nn.Module):
    """Each token goes to its likeliest experts, and their answers are added up by likelihood.

    Few rows read the weights of the experts that they chose. Many rows multiply all experts and weigh those that were
    not chosen with zero: of Mixtral's eight experts at two a token, eight rows choose 7.2 and sixteen 7.9, so that a
    decode step reads all weights anyway, and reading them is what takes its time.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        E, D, F = config.num_experts, config.model_dim, config.ffn_dim
        self.experts_per_token = config.experts_per_token
        self.gate = Linear(D, E, bias=False)
        self.w1 = ExpertLinear(E, D, F)
        self.w2 = ExpertLinear(E, F, D)
        self.w3 = ExpertLinear(E, D, F)

    def forward(self, x_RD: Tensor) -> Tensor:
        likelihood_RE = functional.softmax(self.gate(x_RD).float(), dim=-1)
        share_RX, expert_RX = likelihood_RE.topk(self.experts_per_token)  # X: the experts of a token
        share_RX = (share_RX / share_RX.sum(-1, keepdim=True)).to(x_RD.dtype)
        if expert_RX.numel() <= self.gate.out_features // 2:
            return self._of_few(x_RD, share_RX, expert_RX)
        every_E = torch.arange(self.gate.out_features, device=x_RD.device)
        share_ER = torch.where(expert_RX[..., None] == every_E, share_RX[..., None], 0.0).sum(1).T
        hidden_ERF = functional.silu(self.w1.of_all(x_RD)) * self.w3.of_all(x_RD)
        return self.w2.summed(hidden_ERF * share_ER[..., None])

    def _of_few(self, x_RD: Tensor, share_RX: Tensor, expert_RX: Tensor) -> Tensor:
        """One expert after the other, each by its number."""
        rows = []
        for x_D, share_X, expert_X in zip(x_RD, share_RX, expert_RX, strict=True):
            answers = []
            for share, expert in zip(share_X, expert_X, strict=True):
                hidden_F = functional.silu(self.w1.of_one(x_D, expert)) * self.w3.of_one(x_D, expert)
                answers.append(self.w2.of_one(hidden_F * share, expert))
            rows.append(torch.stack(answers).sum(0))
        return torch.stack(rows)


class Mixtral(Transformer):
    """The experts' ffn is shared among the chips, each has a part of every expert."""

    config_type: ClassVar = MixtralConfig
    config: MixtralConfig
    shard_axis: ClassVar = {**Transformer.shard_axis, "w1": 1, "w3": 1, "w2": 2}

    def layer(self, config: Any) -> nn.Module:
        return Layer(config, Attention(config), MixtureOfExperts(config))

    def sources(self, name: str) -> tuple[str, ...]:
        """Checkpoints keep the experts apart, under `block_sparse_moe`."""
        layer, _, parameter = name.partition(".mlp.")
        if not parameter:
            return (name,)
        if parameter == "gate.weight":
            return (f"{layer}.block_sparse_moe.{parameter}",)
        return tuple(f"{layer}.block_sparse_moe.experts.{e}.{parameter}" for e in range(self.config.num_experts))

    @classmethod
    def read_config(cls, fields: Fields) -> MixtralConfig:
        fields.only("hidden_act", "silu")
        shape = read_shape(fields)
        return MixtralConfig(
            **shape,
            **read_rope(fields, shape["head_dim"]),
            windows=(fields.get("sliding_window"),),
            num_experts=fields["num_local_experts"],
            experts_per_token=fields["num_experts_per_tok"],
        )
