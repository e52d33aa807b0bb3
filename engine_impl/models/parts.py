"""Modules that the families are made of. Matrix weights live in `Linear`, `GroupedLinear`, `Embedding`
and `ExpertLinear` only."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """No initial values: they come from a checkpoint, and drawing them would take longer than all the rest."""

    def reset_parameters(self) -> None: ...


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self) -> None: ...


class GroupedLinear(nn.Module):
    """G `Linear` without biases of one input, as one product: weight [G, out, in]."""

    def __init__(self, stands_for: tuple[str, ...], in_features: int, out_features: int) -> None:
        """`stands_for`: the names, within the same module, of those whose weights it has; checkpoints know these."""
        super().__init__()
        self.stands_for = stands_for
        self.weight = nn.Parameter(torch.empty(len(stands_for), out_features, in_features, device="meta"))

    def forward(self, x_RI: Tensor) -> Tensor:
        """Their answers: [G, R, out]."""
        return torch.einsum("ri,goi->gro", x_RI, self.weight)


class ExpertLinear(nn.Module):
    """A `Linear` for each of E experts, weight [E, in, out] and bias [E, out]."""

    def __init__(self, experts: int, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(experts, out_features)) if bias else None

    def of_all(self, x_RI: Tensor) -> Tensor:
        """Every expert's answer to every row: [E, R, out]."""
        out_ERO = torch.einsum("ri,eio->ero", x_RI, self.weight)
        return out_ERO if self.bias is None else out_ERO + self.bias[:, None]

    def summed(self, x_ERI: Tensor, share_ER: Tensor) -> Tensor:
        """The sum of the experts' answers, each to its own rows and times its share: [R, out]."""
        out_RO = torch.einsum("eri,eio->ro", x_ERI * share_ER[..., None], self.weight)
        return out_RO if self.bias is None else out_RO + share_ER.T @ self.bias

    def of_one(self, x_I: Tensor, expert: Tensor) -> Tensor:
        """One expert's answer to one row; `expert` is an integer scalar. Only that expert's weights are read."""
        out_O = x_I @ self.weight[expert]
        return out_O if self.bias is None else out_O + self.bias[expert]


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich, arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x).to(x.dtype)

    def normed(self, x: Tensor) -> Tensor:
        """x over its root mean square along the last axis, float32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)


class GemmaRMSNorm(RMSNorm):
    """Weights are stored as their distance from one, and multiplied in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * (1 + self.weight.float())).to(x.dtype)


class WideRMSNorm(RMSNorm):
    """Weights are multiplied in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * self.weight.float()).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis (Ba et al., arXiv 1607.06450), computed in float32."""

    def __init__(self, shape: int | tuple[int, ...], eps: float, *, bias: bool = False) -> None:
        """`shape` is the weight's; the leading axes, where there are some, are axes of what is normalised too."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        apart = wide - wide.mean(-1, keepdim=True)
        normed = apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (normed if self.bias is None else normed + self.bias.float()).to(x.dtype)


class Scale(nn.Module):
    """Multiplies by a number, rounded to the type of what it multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.full((), self.factor, dtype=x.dtype, device=x.device)


class SoftCap(nn.Module):
    """cap * tanh(x / cap), computed in float32."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return (self.cap * torch.tanh(x.float() / self.cap)).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return functional.gelu(x, approximate="tanh")
