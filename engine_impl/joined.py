"""The pass over a model that makes one product of two that read the same, for layers under a scan: gate and up of its
gated feed-forwards, k and v of its attention.

The weights lie one behind the other, [2, O, I], so that no column changes its place, and what comes behind reads both
answers where they are. XLA:TPU has an operation a layer less for each, and a bfloat16 step 3 % and 1 % less static
cycles (docs/tpu-evidence.md, "What was tried of a step"). What is joined is decided here alone.
"""

from torch import Tensor, nn

from .models.parts import GroupedLinear, Linear
from .models.transformer import Attention, GatedMLP
from .quantization.linear import Int8Linear

GATE_AND_UP, K_AND_V = ("gate_proj", "up_proj"), ("k_proj", "v_proj")


class Answer(nn.Module):
    """Stands where a module stood whose product is another's now. An adapter changes its answer here."""

    def forward(self, x_RI: Tensor, out_RO: Tensor) -> Tensor:
        return out_RO


def join_products(model: nn.Module) -> None:
    """Joins those whose two weights are of one kind and have no biases, as quantisation left them. These stay apart:
    two kinds (`--quantize-exclude` names one); int4, whose kernels win nothing by it; and what takes XLA:TPU longer as
    one product: int8 whose activations are rounded, and int8 k and v."""
    for module in list(model.modules()):
        if type(module) is GatedMLP:  # not a family's own, which may not ask `both`
            module.gate_and_up = _joined(module, GATE_AND_UP, (Linear, Int8Linear))
        elif type(module) is Attention:
            module.k_and_v = _joined(module, K_AND_V, (Linear,))


def _joined(
    parent: nn.Module, names: tuple[str, str], kinds: tuple[type[Linear | Int8Linear], ...]
) -> GroupedLinear | Int8Linear | None:
    """Their product, where they are alike and of these kinds; only their answers are left in their own places then."""
    one, other = (parent.get_submodule(name) for name in names)
    if not isinstance(one, kinds) or type(one) is not type(other) or one.bias is not None:
        return None
    if isinstance(one, Linear):
        product = GroupedLinear(names, one.in_features, one.out_features)
    elif one.rounds_activations:
        return None
    else:
        floats = GroupedLinear(names, *reversed(one.float_shape))
        product = Int8Linear(floats, None if one.axis is None else 1 + one.axis, one.mesh, multiply=one.multiply)
    for name in names:
        setattr(parent, name, Answer())
    return product
