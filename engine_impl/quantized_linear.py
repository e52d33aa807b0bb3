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

from ..kernels import AXIS, Backend, Blockwise, Split, blockwise_matmul
from . import bridge
from .int8_matmul import Multiply, shared
from .weight_codecs import encode_int4, encode_int8


@dataclass(frozen=True)
class Stored:
    """One array of a quantised weight."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    outputs: int | None
    """its axis of outputs"""
    inputs: int | None
    """its axis of inputs, or of their blocks"""

    def at(self, axis: int | None) -> int | None:
        """Where it has the weight's axis: 0 outputs, 1 inputs."""
        return None if axis is None else (self.outputs, self.inputs)[axis]


class QuantizedLinear(nn.Module):
    """What both kinds share: what is stored, where it lies, and the bias, which stays as it is."""

    reads_stack: ClassVar[bool] = False
    """Its matrix product takes all layers' weights and the number of the layer, `layer`: see forward.py."""

    def __init__(self, replaced: nn.Linear, stored: dict[str, Stored], axis: int | None, mesh: Mesh) -> None:
        """Args:
        replaced: whose place it takes; may be on the meta device.
        stored: its arrays, by parameter name, without the bias.
        axis: of the weight [O, I], the one that the mesh's devices share, where they divide all that is stored.
        """
        super().__init__()
        self.mesh, self.stored = mesh, stored
        self.float_shape = (replaced.out_features, replaced.in_features)
        divides = all(leaf.shape[at] % mesh.size == 0 for leaf in stored.values() if (at := leaf.at(axis)) is not None)
        self.axis = axis if divides else None
        self.register_parameter("bias", replaced.bias)
        for name, leaf in stored.items():
            empty = torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype.name), device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def split(self) -> Split:
        """Which of the weight's axes the devices share."""
        return None if self.axis is None else ("outputs", "inputs")[self.axis]

    def encode(self, weight_OI: jax.Array) -> Mapping[str, jax.Array]:
        """The arrays of a float weight. Pure; runs under jit."""
        raise NotImplementedError

    @property
    def float_spec(self) -> PartitionSpec:
        """How the weight is split on its way in: as its codes are, so that each device encodes its own share."""
        return PartitionSpec(*[AXIS if i == self.axis else None for i in range(2)])

    def specs(self) -> dict[str, PartitionSpec]:
        """How the arrays are split among the devices."""
        axes = {name: (len(leaf.shape), leaf.at(self.axis)) for name, leaf in self.stored.items()}
        return {name: PartitionSpec(*[AXIS if i == at else None for i in range(n)]) for name, (n, at) in axes.items()}

    def with_bias(self, out_RO: Tensor) -> Tensor:
        bias_O = self._parameters["bias"]
        return out_RO if bias_O is None else out_RO + bias_O


class Int8Linear(QuantizedLinear):
    """A scale for each output."""

    code: Tensor
    scale: Tensor

    def __init__(self, replaced: nn.Linear, axis: int | None, mesh: Mesh, *, multiply: Multiply) -> None:
        """`multiply` is one of those in int8_matmul.py."""
        I, O = replaced.in_features, replaced.out_features
        code = Stored((O, I), jnp.dtype("int8"), outputs=0, inputs=1)
        scale = Stored((O,), jnp.dtype("float32"), outputs=0, inputs=None)
        super().__init__(replaced, {"code": code, "scale": scale}, axis, mesh)
        self.multiply = shared(multiply, self.split, mesh)

    def encode(self, weight_OI: jax.Array) -> Mapping[str, jax.Array]:
        return encode_int8(weight_OI)

    def forward(self, x_RI: Tensor) -> Tensor:
        return self.with_bias(bridge.call_kernel(self.multiply, x_RI, self.code, self.scale))


class Int4Linear(QuantizedLinear):
    """A scale and an offset for each block of inputs; see kernels/blockwise_matmul."""

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
        packed = Stored((I // 2, O), jnp.dtype("int8"), outputs=1, inputs=0)
        blocks = Stored((I // block, O), dtype, outputs=1, inputs=0)
        super().__init__(replaced, {"packed": packed, "scale": blocks, "offset": blocks}, axis, mesh)
        self.block, self.dtype = block, dtype
        self.backend: Backend = backend
        self.register_buffer("layer", torch.empty((), dtype=torch.int32, device="meta"))

    def encode(self, weight_OI: jax.Array) -> Mapping[str, jax.Array]:
        return encode_int4(weight_OI, self.block, self.dtype)._asdict()

    def forward(self, x_RI: Tensor) -> Tensor:
        def multiply(x_RI, layer, *leaves):
            stacks = Blockwise(*(leaf if leaf.ndim == 3 else leaf[None] for leaf in leaves))
            return blockwise_matmul(x_RI, stacks, layer, split=self.split, mesh=self.mesh, backend=self.backend)

        return self.with_bias(bridge.call_kernel(multiply, x_RI, self.layer, self.packed, self.scale, self.offset))
