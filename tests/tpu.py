"""Compiles for real TPUs on a machine without one, and reads what the compiler wrote.

Import it as `from ..tpu import ...`; `tests/conftest.py` sets the environment that libtpu needs.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from slipstream.engine_impl.compiler.hlo import Program

KEPT = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
"""What the compilers wrote. A program for a chip that is not here is compiled once, by whichever process and run needs
it first; `make clean` forgets it."""
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class Compiled(NamedTuple):
    """What is read of a compiled program."""

    text: str
    """HLO"""
    memory: dict[str, int]
    """bytes by name"""
    inputs: Any
    """how each lies in memory: a tree like (arguments, named ones)"""
    outputs: Any
    """likewise: a tree like the result"""

    def as_text(self) -> str:
        """As `jax.stages.Compiled` tells it."""
        return self.text

    def memory_analysis(self) -> Any:
        """Likewise."""
        return SimpleNamespace(**self.memory)


Compile = Callable[[jax.stages.Lowered], jax.stages.Compiled]


@contextmanager
def all_compiled_once(mesh: Mesh) -> Iterator[None]:
    """Whatever is compiled within, for the mesh's chips, as `compiled_once` does it."""
    compile_it = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled_once(lowered, mesh, compile_it))
        yield


def compiled_once(lowered: jax.stages.Lowered, mesh: Mesh, compile_it: Compile | None = None) -> Compiled:
    """The program for the mesh's chips. Two are the same if nothing that the compiler is given differs: the lowered
    text, which has shardings, donations and kernels in it, the chips, its flags and its version."""
    chips = [(chip.platform, chip.device_kind, chip.id, getattr(chip, "coords", None)) for chip in mesh.devices.flat]
    given = lowered.as_text(), chips, [os.environ.get(name) for name in FLAGS], _versions()
    file = KEPT / hashlib.sha256(repr(given).encode()).hexdigest()
    if not file.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=KEPT, delete=False) as whole:  # two processes may write it
            compiled = lowered.compile() if compile_it is None else compile_it(lowered)
            told = json.dumps(_told(lowered, compiled))
            whole.write(gzip.compress(told.encode(), compresslevel=1))
        os.replace(whole.name, file)
    text, memory, inputs, outputs = json.loads(gzip.decompress(file.read_bytes()))
    trees = jax.tree.unflatten(lowered.in_tree, inputs), jax.tree.unflatten(lowered.out_tree, outputs)
    return Compiled(text, memory, *trees)


def _told(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> tuple[Any, ...]:
    memory, formats = memory_of(compiled), (compiled.input_formats, compiled.output_formats)
    leaves = [tree.flatten_up_to(one) for tree, one in zip((lowered.in_tree, lowered.out_tree), formats, strict=True)]
    return (
        text_of(compiled),
        {name: getattr(memory, name) for name in dir(memory) if name.endswith("_in_bytes")},
        *([str(leaf and leaf.layout) for leaf in of_tree] for of_tree in leaves),
    )


@functools.cache
def _versions() -> list[str]:
    installed = {dist.metadata["Name"] for dist in metadata.distributions()}
    return [metadata.version(name) for name in COMPILERS if name in installed]


@functools.cache
def _devices(topology: str) -> tuple:
    return tuple(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


def tpu_mesh(topology: str = "v5e:2x4", chips: int | None = None) -> Mesh:
    """A mesh with axis "tensor" over the first `chips` (all, if None) of a topology such as "v5e:2x4" or "v6e:2x2"."""
    return Mesh(np.array(_devices(topology)[:chips]), ("tensor",))


def abstract(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
    """An array on the mesh that is never allocated; `spec` as PartitionSpec takes it."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def compile_for(mesh: Mesh, fn: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Compiled:
    """`fn` compiled by the real TPU compiler for the mesh's chips; `args` are pytrees of `abstract` arrays on it."""
    devices = {d for leaf in jax.tree.leaves(args) for d in leaf.sharding.device_set}
    if devices != set(mesh.devices.flat):
        raise ValueError(f"arguments lie on {len(devices)} devices, the mesh has {mesh.size=}; make both by one mesh")
    return compiled_once(jax.jit(fn, donate_argnums=donate).lower(*args), mesh)


def nbytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of an abstract array on one chip, before any tile padding."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * jnp.dtype(array.dtype).itemsize


def text_of(compiled: jax.stages.Compiled | Compiled) -> str:
    """What the compiler made of it, as HLO."""
    text = compiled.as_text()
    assert text is not None
    return text


def memory_of(compiled: jax.stages.Compiled | Compiled) -> Any:
    """The compiler's account of its memory: argument_size_in_bytes, temp_size_in_bytes, alias_size_in_bytes, ..."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory


def layer_sized_copies(compiled: Compiled, cache: jax.ShapeDtypeStruct) -> list[str]:
    """What copies a layer of the cache or more; see `Program.copies_of`."""
    assert cache.sharding is not None
    shard = cache.sharding.shard_shape(cache.shape)
    return Program(text_of(compiled)).copies_of(shard, nbytes(cache) // shard[0])


def unpacked_mask_bytes(hlo: Program, slots: int, vocabulary: int) -> int:
    """Where XLA repeats a grammar's words for their bits by an operation of its own, as on v5p: 32 numbers stand in a
    tile of 128 lanes, so that a step's take as much as four times its logits. 0 where that is part of a fusion."""
    fused = {
        callee
        for computation in hlo.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for callee in instruction.callees
    }
    repeated = [
        array.bytes
        for name, computation in hlo.computations.items()
        if name not in fused
        for instruction in computation.values()
        for array in instruction.result
        if array.shape == (slots, vocabulary // 32, 32) and not array.is_on_chip
    ]
    return 128 // 32 * max(repeated, default=0)
