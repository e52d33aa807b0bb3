"""The pass over a model that puts native norms where its own stood: one operation instead of XLA:CPU's four."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from ..kernels import Backend, rms_norm
from . import bridge
from .models.parts import GemmaRMSNorm, RMSNorm, WideRMSNorm

FACTORS: Mapping[type[nn.Module], Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        RMSNorm: lambda weight_D: weight_D,
        WideRMSNorm: lambda weight_D: weight_D,
        GemmaRMSNorm: lambda weight_D: 1 + weight_D,
    }
)
"""What the norms multiply by, of their weights in float32. A family's own kinds stay as they are."""


class KernelRMSNorm(nn.Module):
    """In the place of one of these, in float32."""

    def __init__(self, replaced: RMSNorm, backend: Backend) -> None:
        super().__init__()
        self.weight, self.factor = replaced.weight, FACTORS[type(replaced)]
        self.kernel = functools.partial(rms_norm, eps=replaced.eps, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return bridge.call_kernel(self.kernel, x, self.factor(self.weight))


def swap_norms(model: nn.Module, backend: Backend) -> None:
    """Swaps a model's norms, those that `FACTORS` knows."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RMSNorm) and type(module) in FACTORS:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, KernelRMSNorm(module, backend))
