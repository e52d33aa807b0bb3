"""The pass over a model that makes one product of the gate and up of its gated feed-forwards, for layers under a scan.

The weights lie one behind the other, [2, F, D], so that no column changes its place, and down's product reads both
answers where they are. XLA:TPU has one operation a layer less, and 3 % of a bfloat16 step's static cycles
(docs/tpu-evidence.md, "What was tried of a step"). Which feed-forwards are joined is decided here alone.
"""

from torch import Tensor, nn

from .models.parts import GroupedLinear, Linear
from .models.transformer import GatedMLP
from .quantization.linear import Int8Linear

NAMES = ("gate_proj", "up_proj")


class Answer(nn.Module):
    """Stands where a module stood whose product is another's now. An adapter changes its answer here."""

    def forward(self, x_RI: Tensor, out_RO: Tensor) -> Tensor:
        return out_RO


class JoinedMLP(nn.Module):
    """In the place of a `GatedMLP`."""

    def __init__(self, replaced: GatedMLP, gate_and_up: GroupedLinear | Int8Linear) -> None:
        super().__init__()
        self.activation = replaced.activation
        self.gate_and_up = gate_and_up
        self.gate_proj, self.up_proj = Answer(), Answer()
        self.down_proj = replaced.down_proj

    def forward(self, x_RD: Tensor) -> Tensor:
        both_GRF = self.gate_and_up(x_RD)
        gate_RF, up_RF = self.gate_proj(x_RD, both_GRF[0]), self.up_proj(x_RD, both_GRF[1])
        return self.down_proj(self.activation(gate_RF) * up_RF)


def join_gate_and_up(model: nn.Module) -> None:
    """Swaps those whose two weights are of one kind, as quantisation left them: both floats, or both int8. These stay
    apart: two kinds (`--quantize-exclude` names one); int4, whose kernels win nothing by it; int8 whose activations are
    rounded, where one product takes XLA:TPU longer."""
    for name, module in list(model.named_modules()):
        if type(module) is GatedMLP and (both := _joined(module)) is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, JoinedMLP(module, both))


def _joined(mlp: GatedMLP) -> GroupedLinear | Int8Linear | None:
    gate, up = mlp.gate_proj, mlp.up_proj
    if isinstance(gate, Int8Linear) and isinstance(up, Int8Linear) and not gate.rounds_activations:
        both = GroupedLinear(NAMES, *reversed(gate.float_shape))
        return Int8Linear(both, None if gate.axis is None else 1 + gate.axis, gate.mesh, multiply=gate.multiply)
    if isinstance(gate, Linear) and isinstance(up, Linear):
        return GroupedLinear(NAMES, gate.in_features, gate.out_features)
    return None
