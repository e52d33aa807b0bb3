"""Adapters on the devices: for each site the A and the B of X adapters, beside the model's parameters.

Index 0 is none and has no place here: the adapter of index i lies at i - 1. Places that are free are zeros.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..errors import AdaptersLostError
from ..placing import placed
from .sites import DOWN, UP, Site

Loop = Literal["scan", "unrolled"]
"""As forward.py has it."""

Stacks = Any
"""{array's name: [L, X, ...]} where the layer loop scans; else a tuple with {array's name: [X, ...]} for each layer."""


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter in the host's memory."""

    rank: int
    """the largest of its sites'"""
    array: Mapping[str, np.ndarray]
    """By name, all layers stacked: A is [L, r, I], B, with the adapter's scale in it, [L, O, r]. Zeros are left out."""
    device_bytes: int
    """of all devices' memory, while it is there"""

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.array.values())


@dataclass(frozen=True)
class AdapterPlaces:
    """What an engine has room for."""

    sites: tuple[Site, ...]
    layers: int
    count: int
    """X"""
    rank: int
    """r"""
    mesh: Mesh
    dtype: jnp.dtype

    def abstract(self, loop: Loop) -> Stacks:
        """Shapes, types and shardings."""
        if loop == "scan":
            return self._described((self.layers, self.count))
        return tuple(self._described((self.count,)) for _ in range(self.layers))

    def empty(self, loop: Loop) -> Stacks:
        """All places free; what puts an adapter there is compiled."""
        empty = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype, device=of.sharding), self.abstract(loop))
        return self.with_adapter(empty, 1, AdapterWeights(0, {}, self.bytes_of_one))

    def with_adapter(self, stacks: Stacks, index: int, weights: AdapterWeights) -> Stacks:
        """The stacks, which are donated, with an adapter at `index`, from 1 on; whatever was there."""
        arrays = {
            name: placed(self._padded(name, of.shape, weights), of.sharding)
            for name, of in self._described((self.layers,)).items()
        }
        return self._put["scan" if isinstance(stacks, dict) else "unrolled"](stacks, arrays, np.int32(index - 1))

    def put(self, stacks: Stacks, index: int, weights: AdapterWeights) -> Stacks:
        """`with_adapter`. Raises AdaptersLostError when it fails once the stacks are donated; before, what made it
        fail."""
        try:
            return self.with_adapter(stacks, index, weights)
        except Exception as error:
            if not any(array.is_deleted() for array in jax.tree.leaves(stacks)):
                raise
            raise AdaptersLostError("the adapters on the devices are lost: another could not be written") from error

    def emptied(self, stacks: Stacks, loop: Loop) -> Stacks:
        """All places free, whatever has become of those that were there."""
        for array in jax.tree.leaves(stacks):
            array.delete()  # before the new ones are made: two may not fit
        return self.empty(loop)

    @property
    def bytes_of_one(self) -> int:
        """What one adapter takes of the devices' memory, what each of them has counted for each."""
        shares = (of.sharding.shard_shape(of.shape) for of in self._described((self.layers,)).values())
        return self.mesh.size * self.dtype.itemsize * sum(map(math.prod, shares))

    def _described(self, leading: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            site.name(part): jax.ShapeDtypeStruct(
                (*leading, *site.shape(part, self.rank)),
                self.dtype,
                sharding=NamedSharding(self.mesh, PartitionSpec(*[None] * len(leading), *site.spec(part))),
            )
            for site in self.sites
            for part in (DOWN, UP)
        }

    def _padded(self, name: str, shape: tuple[int, ...], weights: AdapterWeights) -> np.ndarray:
        padded = np.zeros(shape, self.dtype)
        if (array := weights.array.get(name)) is not None:
            padded[tuple(map(slice, array.shape))] = array
        return padded

    @cached_property
    def _put(self) -> dict[Loop, Any]:
        def put(stacks: Stacks, arrays: dict[str, jax.Array], at: jax.Array) -> Stacks:
            if isinstance(stacks, dict):
                return {name: stack.at[:, at].set(arrays[name]) for name, stack in stacks.items()}
            return tuple(
                {name: stack.at[at].set(arrays[name][layer]) for name, stack in of_layer.items()}
                for layer, of_layer in enumerate(stacks)
            )

        def jitted(loop: Loop) -> Any:
            shardings = jax.tree.map(lambda of: of.sharding, self.abstract(loop))
            return jax.jit(put, donate_argnums=0, out_shardings=shardings)

        return {"scan": jitted("scan"), "unrolled": jitted("unrolled")}
