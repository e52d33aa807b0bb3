"""A feed-forward that is a choice of experts, for each token anew."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

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


@runtime_checkable
class AskedByRow(Protocol):
    """Experts' matrices of which rows read only those that they chose."""

    def of_chosen(self, x: Tensor, expert_RX: Tensor) -> Tensor:
        """x [R, in], or a row for each choice, [R, X, in] -> [R, X, out]."""
        ...


SHARED = {"w1": (0, 2), "w3": (0, 2), "w2": (0, 1)}
"""What chips share of `MixtureOfExperts` (see `Decoder.shard_axis`): the experts; where there are too few, the ffn."""


class MixtureOfExperts(nn.Module):
    """Each token goes to its likeliest experts, and their answers are added up by likelihood.

    On CPUs with native kernels, which sort rows by expert, each row is multiplied with the experts that it chose.

    Elsewhere all rows go through all experts that a chip has, and what was not chosen counts for nothing. A step reads
    nearly all weights anyway, and reading is what takes its time. A layer's experts under a scan on v5e:2x4, bf16, in
    millions of cycles by the compiler's estimate (libtpu 0.0.42), without the all-reduce that all have:

        rows                                           8      64     256     512    1024    2048
        qwen3-30b-a3b   experts shared, all          0.44    0.46    0.51    0.76    1.32    2.60
                        each one's ffn shared, all           1.01    1.12    1.41    2.39
                        experts shared, sorted               1.12                    1.53    2.23
                        ffn shared, one by one       0.43
        gpt-oss-120b    experts shared, all                  2.24            3.39
                        ffn shared, all                      6.96            8.38
        gpt-oss-20b     experts shared, all                  0.63    0.66    0.93    1.79
                        ffn shared, all                      0.57    0.67    0.92    1.77
        mixtral-8x7b    experts shared, all                  0.93                    3.07
                        ffn shared, all                      0.94                    3.08

    Parts of a narrow ffn (768 / 8, 2880 / 8) are no whole tiles, and of gpt-oss-120b the compiler then copies a layer's
    weights, 253 MiB. Rows sorted by expert are multiplied by groups (`ragged_dot`), a kernel whose own time is not in
    these cycles: it wants the weights copied out of the scan's stack, and a copy of each row for each choice. One by
    one are 311 operations a layer instead of 20.

    There a row by itself, which a step on TPUs never has, reads only the experts that it chose.
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
        if isinstance(self.w1, AskedByRow):
            return self._of_chosen(x_RD, share_RX, expert_RX)
        if len(x_RD) == 1:
            return self._of_one_row(x_RD[0], share_RX[0], expert_RX[0])[None]
        return self._all_through_all(x_RD, share_RX, expert_RX)

    def _of_chosen(self, x_RD: Tensor, share_RX: Tensor, expert_RX: Tensor) -> Tensor:
        w1, w2, w3 = (cast(AskedByRow, part) for part in (self.w1, self.w2, self.w3))
        hidden_RXF = self.gated(w1.of_chosen(x_RD, expert_RX), w3.of_chosen(x_RD, expert_RX))
        return (w2.of_chosen(hidden_RXF, expert_RX) * share_RX[..., None]).sum(1)

    def _of_one_row(self, x_D: Tensor, share_X: Tensor, expert_X: Tensor) -> Tensor:
        answers = []
        for share, expert in zip(share_X, expert_X, strict=True):
            hidden_F = self.gated(self.w1.of_one(x_D, expert), self.w3.of_one(x_D, expert))
            answers.append(self.w2.of_one(hidden_F, expert) * share)
        return torch.stack(answers).sum(0)

    def _all_through_all(self, x_RD: Tensor, share_RX: Tensor, expert_RX: Tensor) -> Tensor:
        """The share of an expert that was not chosen is zero."""
        share_ER = torch.where(self._is_chosen(expert_RX), share_RX[..., None], 0.0).sum(1).T
        return self.w2.summed(self.gated(self.w1.of_all(x_RD), self.w3.of_all(x_RD)), share_ER)

    def _is_chosen(self, expert_RX: Tensor) -> Tensor:
        """[R, X, E]"""
        return expert_RX[..., None] == torch.arange(self.num_experts, device=expert_RX.device)
