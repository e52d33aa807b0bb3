"""Linear modules whose weights are codes. They stand where a `Linear` stood; a model's `forward` does not know.

O outputs, I inputs, Q blocks of inputs, R rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh, PartitionSpec
from torch import Tensor, nn

from ...kernels import AXIS, Backend, Blockwise, Split, blockwise_matmul
from .. import bridge
from ..checkpoints.contract import Codes
from ..models.parts import ExpertLinear, GroupedLinear, Linear
from .codecs import encode_int4, encode_int8, encode_int8_experts
from .int8_matmul import Multiply, multiply_rounded, shared


@dataclass(frozen=True)
class Stored:
    """One array of a quantised weight."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: dict[int, int]
    """axis of the float weight -> its own; an axis that is not here is no axis of this array"""

    def spec(self, axis: int | None) -> PartitionSpec:
        """How it is split when the weight is along `axis`."""
        own = None if axis is None else self.axes.get(axis)
        return PartitionSpec(*[AXIS if i == own else None for i in range(len(self.shape))])


class EncodedModule(nn.Module):
    """A module whose weight is stored as other arrays: which, where they lie, and the bias, which stays as it is."""

    kind: str
    """What its weight is stored as: the type of floats, "int8" or "int4", or a checkpoint's own: "8-bit", "4-bit" or
    "float8"."""
    source: jnp.dtype = jnp.dtype("float32")
    """What `encode` takes. Rounding before codes are made would move values off their grid."""
    keeps_codes: bool = False
    """Whether it is made of a checkpoint's own codes."""
    by_expert: ClassVar[bool] = False
    """Whether `encode` and `encode_codes` take one expert's matrix, as [out, in], of a weight [E, in, out], and what
    they give is stacked."""
    reads_stack: ClassVar[bool] = False
    """Its matrix product takes all layers' weights and the number of the layer, `layer`: see forward.py."""
    skips_padding: ClassVar[bool] = False
    """Whether it takes which rows are no padding, `is_live`, likewise: the others cost next to nothing, and are zeros
    before the bias."""
    lies_in_stack: ClassVar[bool] = False
    """Whether they are stacked where layers are unrolled, too: whoever reads the stack makes no copy of a layer."""

    def __init__(self, replaced: nn.Module, stored: dict[str, Stored], axis: int | None, mesh: Mesh) -> None:
        """Args:
        replaced: whose place it takes; may be on the meta device.
        stored: its arrays, by parameter name, without the bias.
        axis: of the float weight, the one that the mesh's devices share, where they divide all that is stored.
        """
        super().__init__()
        self.mesh, self.stored = mesh, stored
        self.stands_for: tuple[str, ...] = getattr(replaced, "stands_for", ())
        """as of `GroupedLinear`"""
        self.float_shape: tuple[int, ...] = tuple(replaced.get_parameter("weight").shape)
        shared = [leaf.shape[leaf.axes[axis]] for leaf in stored.values() if axis in leaf.axes]
        self.axis = axis if all(size % mesh.size == 0 for size in shared) else None
        self.register_parameter("bias", getattr(replaced, "bias", None))
        for name, leaf in stored.items():
            empty = torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype.name), device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def split(self) -> Split:
        """Which of the axes of a weight [O, I], or [G, O, I], the devices share."""
        return None if self.axis is None else ("outputs", "inputs")[self.axis - len(self.float_shape)]

    def encode(self, weight: jax.Array) -> Mapping[str, jax.Array]:
        """The arrays of a float weight; of one, where it stands for several."""
        raise NotImplementedError

    def encode_codes(self, codes: Codes) -> Mapping[str, jax.Array]:
        """The arrays of a checkpoint's own codes, which may be numpy's."""
        raise NotImplementedError

    @property
    def float_spec(self) -> PartitionSpec:
        """How the weight is split on its way in: as its codes are, so that each device encodes its own share."""
        return PartitionSpec(*[AXIS if i == self.axis else None for i in range(len(self.float_shape))])

    def with_bias(self, out_RO: Tensor) -> Tensor:
        bias_O = self._parameters["bias"]
        return out_RO if bias_O is None else out_RO + bias_O


class Int8Linear(EncodedModule):
    """A scale for each output."""

    kind = "int8"
    code: Tensor
    scale: Tensor

    def __init__(self, replaced: Linear | GroupedLinear, axis: int | None, mesh: Mesh, *, multiply: Multiply) -> None:
        """`multiply` is one of those in int8_matmul.py."""
        shape = tuple(replaced.weight.shape)
        code = Stored(shape, jnp.dtype("int8"), {i: i for i in range(len(shape))})
        scale = Stored(shape[:-1], jnp.dtype("float32"), {i: i for i in range(len(shape) - 1)})
        super().__init__(replaced, {"code": code, "scale": scale}, axis, mesh)
        self.multiply, self.rounds_activations = multiply, multiply is multiply_rounded
        self._multiply_shares = shared(multiply, self.split, mesh, groups=len(shape) > 2)

    def encode(self, weight: jax.Array) -> Mapping[str, jax.Array]:
        return encode_int8(weight)

    def forward(self, x_RI: Tensor) -> Tensor:
        return self.with_bias(bridge.call_kernel(self._multiply_shares, x_RI, self.code, self.scale))


class Int8ExpertLinear(EncodedModule):
    """A scale for each output of each expert; the face of `ExpertLinear`, whose biases stay floats."""

    kind = "int8"
    code: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, replaced: ExpertLinear, axis: int | None, mesh: Mesh) -> None:
        E, I, O = replaced.weight.shape
        code = Stored((E, I, O), jnp.dtype("int8"), {0: 0, 1: 1, 2: 2})
        scale = Stored((E, O), jnp.dtype("float32"), {0: 0, 2: 1})
        super().__init__(replaced, {"code": code, "scale": scale}, axis, mesh)

    def encode(self, weight: jax.Array) -> Mapping[str, jax.Array]:
        return encode_int8_experts(weight)

    def of_all(self, x_RI: Tensor) -> Tensor:
        out_ERO = torch.einsum("ri,eio->ero", x_RI, self.code.to(x_RI.dtype))
        out_ERO = (out_ERO * self.scale[:, None]).to(x_RI.dtype)
        return out_ERO if self.bias is None else out_ERO + self.bias[:, None]

    def summed(self, x_ERI: Tensor, share_ER: Tensor) -> Tensor:
        out_ERO = torch.einsum("eri,eio->ero", x_ERI * share_ER[..., None], self.code.to(x_ERI.dtype))
        out_RO = (out_ERO * self.scale[:, None]).sum(0).to(x_ERI.dtype)
        return out_RO if self.bias is None else out_RO + share_ER.T @ self.bias

    def of_one(self, x_I: Tensor, expert: Tensor) -> Tensor:
        out_O = (x_I @ self.code[expert].to(x_I.dtype) * self.scale[expert]).to(x_I.dtype)
        return out_O if self.bias is None else out_O + self.bias[expert]


class Int4Linear(EncodedModule):
    """A scale and an offset for each block of inputs; see kernels/blockwise_matmul."""

    kind = "int4"
    reads_stack = True
    packed: Tensor
    scale: Tensor
    offset: Tensor
    layer: Tensor

    def __init__(
        self, replaced: nn.Linear, axis: int | None, mesh: Mesh, *, block: int, dtype: jnp.dtype, backend: Backend
    ) -> None:
        """`block` divides the inputs; `dtype` is the activations'."""
        I, O = replaced.in_features, replaced.out_features
        packed = Stored((I // 2, O), jnp.dtype("int8"), {0: 1, 1: 0})
        blocks = Stored((I // block, O), dtype, {0: 1, 1: 0})
        super().__init__(replaced, {"packed": packed, "scale": blocks, "offset": blocks}, axis, mesh)
        self.block, self.dtype = block, dtype
        self.backend: Backend = backend
        self.register_buffer("layer", torch.empty((), dtype=torch.int32, device="meta"))

    def encode(self, weight: jax.Array) -> Mapping[str, jax.Array]:
        return encode_int4(weight, self.block, self.dtype)._asdict()

    def forward(self, x_RI: Tensor) -> Tensor:
        def multiply(x_RI, layer, *leaves):
            stacks = Blockwise(*(leaf if leaf.ndim == 3 else leaf[None] for leaf in leaves))
            return blockwise_matmul(x_RI, stacks, layer, split=self.split, mesh=self.mesh, backend=self.backend)

        return self.with_bias(bridge.call_kernel(multiply, x_RI, self.layer, self.packed, self.scale, self.offset))
