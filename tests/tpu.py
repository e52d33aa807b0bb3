"""Compiles for real TPUs on a machine without one, and reads what the compiler wrote.

Import it as `from ..tpu import ...`; `tests/conftest.py` sets the environment that libtpu needs.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%?[\w.-]+) = (.*?) ([\w-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COPIES = {"copy", "copy-start", "transpose", "reshape", "fusion"}
_BITS = re.compile(r"\d+")


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


def cache_sized_copies(hlo_text: str, threshold_bytes: int) -> list[str]:
    """The copies, transposes, reshapes and fusions that write `threshold_bytes` or more to HBM, as "name = type op".

    Skips the bodies of fusions, which write nothing of their own, and results in VMEM ("S(1)" in the layout): those are
    the compiler's prefetches. `compiled.as_text()` is what to pass, and one layer of the cache is a good threshold.
    """
    fused = set(re.findall(r"calls=(%?[\w.-]+)", hlo_text))
    found, inside = [], ""
    for line in hlo_text.splitlines():
        if line and not line[0].isspace():
            inside = line.removeprefix("ENTRY ").split(" ")[0]
        match = _INSTRUCTION.match(line)
        if match is None or inside in fused:
            continue
        name, result, op = match.groups()
        arrays = _ARRAY.findall(result)
        if op == "copy-start":  # (to, from, context)
            arrays = arrays[:1]
        if op in _COPIES and any(_bytes(d, s) >= threshold_bytes and "S(1)" not in layout for d, s, layout in arrays):
            found.append(f"{name} = {result} {op}")
    return found


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.search(dtype)  # pred, token and the like have none
    return math.prod(int(n) for n in shape.split(",") if n) * (int(bits[0]) if bits else 8) // 8
