"""Compiles for real TPUs on a machine without one, and reads what the compiler wrote.

Import it as `from ..tpu import ...`; `tests/conftest.py` sets the environment that libtpu needs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from slipstream.engine_impl.compiler.hlo import Program


@functools.cache
def _devices(topology: str) -> tuple:
    return tuple(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


def tpu_mesh(topology: str = "v5e:2x4", chips: int | None = None) -> Mesh:
    """A mesh with axis "tensor" over the first `chips` (all, if None) of a topology such as "v5e:2x4" or "v6e:2x2"."""
    return Mesh(np.array(_devices(topology)[:chips]), ("tensor",))


def abstract(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
    """An array on the mesh that is never allocated; `spec` as PartitionSpec takes it."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def compile_for(mesh: Mesh, fn: Callable, *args: Any, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """`fn` compiled by the real TPU compiler for the mesh's chips; `args` are pytrees of `abstract` arrays on it."""
    devices = {d for leaf in jax.tree.leaves(args) for d in leaf.sharding.device_set}
    if devices != set(mesh.devices.flat):
        raise ValueError(f"arguments lie on {len(devices)} devices, the mesh has {mesh.size=}; make both by one mesh")
    return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def nbytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of an abstract array on one chip, before any tile padding."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * jnp.dtype(array.dtype).itemsize


def text_of(compiled: jax.stages.Compiled) -> str:
    """What the compiler made of it, as HLO."""
    text = compiled.as_text()
    assert text is not None
    return text


def memory_of(compiled: jax.stages.Compiled) -> Any:
    """The compiler's account of its memory: argument_size_in_bytes, temp_size_in_bytes, alias_size_in_bytes, ..."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory


def layer_sized_copies(compiled: jax.stages.Compiled, cache: jax.ShapeDtypeStruct) -> list[str]:
    """What copies a layer of the cache or more; see `Program.copies_of`."""
    assert cache.sharding is not None
    shard = cache.sharding.shard_shape(cache.shape)
    return Program(text_of(compiled)).copies_of(shard, nbytes(cache) // shard[0])
