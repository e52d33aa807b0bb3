"""Made-up weights and a made-up attention, by which a model of any size runs in milliseconds a layer.

The weights of linear modules are never made: such a module's answer to a row is a scalar product times a fixed pattern.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWN = 1 << 26
"""Elements of a matrix up to which its rows may differ."""


def by_row(q_RNH: Tensor, k_RKH: Tensor, v_RKH: Tensor, sink_N: Tensor | None = None, /) -> Tensor:
    """An attention of each row to itself, in which q, k, v and sinks all count."""
    if sink_N is not None:
        q_RNH = q_RNH + sink_N[:, None]
    copies = q_RNH.shape[1] // k_RKH.shape[1]
    k_RNH, v_RNH = k_RKH.repeat_interleave(copies, 1), v_RKH.repeat_interleave(copies, 1)
    return v_RNH * (1 + torch.tanh((q_RNH * k_RNH).sum(-1, keepdim=True)))


def generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def made_up(name: str, parameter: Tensor, rows_differ: bool) -> Tensor:
    """Values for a parameter. Where rows do not differ, they are the same memory."""
    generator, shape = generator_of(name), parameter.shape
    if parameter.dim() < 2:
        return 0.5 + 0.3 * torch.randn(shape, generator=generator)
    if rows_differ and parameter.numel() <= DRAWN:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return (torch.randn(shape[-1], generator=generator) / shape[-1] ** 0.5).expand(shape)


class MadeUpLinear(TorchFunctionMode):
    """Linear modules with weights whose rows are all the same give different outputs."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear or args[1].stride(0) != 0:
            return func(*args, **(kwargs or {}))
        x, weight_OI, bias_O = args if len(args) == 3 else (*args, None)
        pattern_O = torch.cos(1.3 * torch.arange(weight_OI.shape[0]))
        out = (x * weight_OI[0]).sum(-1, keepdim=True) * pattern_O
        return out if bias_O is None else out + bias_O
