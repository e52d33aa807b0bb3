"""A feed-forward that is a choice of experts, for each token anew."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .parts import ExpertLinear, Linear
from .transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(TransformerConfig):
    """The shape of a model with experts; `ffn_dim` is one expert's."""

    num_experts: int
    experts_per_token: int
    shares_sum_to_one: bool = True
    """Whether the likelihoods of a token's experts are scaled to sum up to one."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What goes into an expert's last product."""
    return functional.silu(gate) * up


MANY_ROWS = 2048
"""From here on rows are sorted by expert, below they all go through all experts. The table in `MixtureOfExperts` says
that it pays from some 1500 on; most programs have 1024 rows or fewer."""


class MixtureOfExperts(nn.Module):
    """Each token goes to its likeliest experts, and their answers are added up by likelihood.

    How depends on the number of rows, which a program knows when it is compiled. Mixtral 8x7B on v5e:2x4, a layer's
    experts under a scan, in millions of cycles (libtpu 0.0.42):

        rows                       64     256     512    1024    2048
        all through all          0.95    1.07    1.60    3.09    6.48
        sorted by expert         3.19    3.29    3.44    4.09    5.39
          copy, sort, add        2.54    2.64    2.79    3.10    3.71
          the products           0.65    0.65    0.65    0.99    1.68

    The compiler estimates all but the grouped products, which are a kernel: those are counted at the chip's full rate,
    a group's rows filled up to tiles of 128, and never below the 0.65 that reading the weights takes.

    A decode step reads all weights anyway (of eight experts, two a token, eight rows choose 7.2), and reading is what
    takes its time; the kernel needs a copy of them out of the scan's stack. Only a step of one or two rows leaves most
    of them alone.
    """

    def __init__(
        self, config: MixtureConfig, gated: Callable[[Tensor, Tensor], Tensor] = swiglu, *, bias: bool = False
    ) -> None:
        """`bias`: whether the gate and the experts have biases."""
        super().__init__()
        E, D, F = config.num_experts, config.model_dim, config.ffn_dim
        self.num_experts, self.experts_per_token = E, config.experts_per_token
        self.shares_sum_to_one = config.shares_sum_to_one
        self.gated = gated
        self.gate = Linear(D, E, bias=bias)
        self.w1 = ExpertLinear(E, D, F, bias=bias)
        self.w2 = ExpertLinear(E, F, D, bias=bias)
        self.w3 = ExpertLinear(E, D, F, bias=bias)

    def forward(self, x_RD: Tensor) -> Tensor:
        likelihood_RE = functional.softmax(self.gate(x_RD).float(), dim=-1)
        share_RX, expert_RX = likelihood_RE.topk(self.experts_per_token)  # X: the experts of a token
        if self.shares_sum_to_one:
            share_RX = share_RX / share_RX.sum(-1, keepdim=True)
        share_RX = share_RX.to(x_RD.dtype)
        if expert_RX.numel() <= self.num_experts // 2:
            return self._one_by_one(x_RD, share_RX, expert_RX)
        if len(x_RD) < MANY_ROWS:
            return self._all_through_all(x_RD, share_RX, expert_RX)
        return self._sorted(x_RD, share_RX, expert_RX)

    def _one_by_one(self, x_RD: Tensor, share_RX: Tensor, expert_RX: Tensor) -> Tensor:
        rows = []
        for x_D, share_X, expert_X in zip(x_RD, share_RX, expert_RX, strict=True):
            answers = []
            for share, expert in zip(share_X, expert_X, strict=True):
                hidden_F = self.gated(self.w1.of_one(x_D, expert), self.w3.of_one(x_D, expert))
                answers.append(self.w2.of_one(hidden_F, expert) * share)
            rows.append(torch.stack(answers).sum(0))
        return torch.stack(rows)

    def _all_through_all(self, x_RD: Tensor, share_RX: Tensor, expert_RX: Tensor) -> Tensor:
        """The share of an expert that was not chosen is zero."""
        share_ER = torch.where(self._is_chosen(expert_RX), share_RX[..., None], 0.0).sum(1).T
        return self.w2.summed(self.gated(self.w1.of_all(x_RD), self.w3.of_all(x_RD)), share_ER)

    def _sorted(self, x_RD: Tensor, share_RX: Tensor, expert_RX: Tensor) -> Tensor:
        """P: all choices of all rows, a choice's row is its number over X."""
        order_P = expert_RX.flatten().argsort()
        count_E = self._is_chosen(expert_RX).sum((0, 1)).to(torch.int32)
        x_PD = x_RD[order_P // self.experts_per_token]
        hidden_PF = self.gated(self.w1.of_groups(x_PD, count_E), self.w3.of_groups(x_PD, count_E))
        out_PD = self.w2.of_groups(hidden_PF, count_E)[order_P.argsort()]
        return (out_PD.unflatten(0, expert_RX.shape) * share_RX[..., None]).sum(1)

    def _is_chosen(self, expert_RX: Tensor) -> Tensor:
        """[R, X, E]"""
        return expert_RX[..., None] == torch.arange(self.num_experts, device=expert_RX.device)
