"""Which device holds what: the tensor-parallel size, the mesh, and a partition spec for each parameter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ...kernels.backend import AXIS
from ..errors import RefusedError
from ..models.decoder import Decoder


def tensor_parallel_sizes(num_heads: int, num_kv_heads: int, devices: int) -> list[int]:
    """Sizes that a model can be split into: each device gets as many query heads as the others, and whole kv heads or,
    when there are fewer of them than devices, a copy of one."""
    return [
        size
        for size in range(1, devices + 1)
        if num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]


def make_mesh(devices: Sequence[Any], num_heads: int, num_kv_heads: int, wanted: int | None) -> Mesh:
    """A mesh over the axis "tensor": the size wanted, else the largest possible.

    Raises RefusedError for a size that the heads or the devices do not allow, naming those that work.
    """
    sizes = tensor_parallel_sizes(num_heads, num_kv_heads, len(devices))
    size = sizes[-1] if wanted is None else wanted
    if size not in sizes:
        raise RefusedError(
            f"tensor_parallel={size} does not work with {num_heads} query heads, {num_kv_heads} kv heads and "
            f"{len(devices)} devices; sizes that do: {', '.join(map(str, sizes))}"
        )
    return Mesh(np.array(devices[:size]), (AXIS,))


def parameter_spec(model: Decoder, name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How one parameter is split: along the axis that the model's `shard_axis` gives for its module, if the devices
    divide it; otherwise each device has a copy. One that has several in it is split as each of them would be."""
    one, *others = model.parameters_in(name)
    front = 1 if others else 0
    axis = model.shared_axis(one.split(".")[-2], shape[front:], mesh.size)
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*[AXIS if i == front + axis else None for i in range(len(shape))])
