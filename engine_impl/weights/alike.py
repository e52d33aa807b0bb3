"""Vectors of stacked layers that lie alike, several in one array: both norms' weights, and the int8 scales of k and v,
of o and down.

XLA:TPU has an operation for each vector that a layer takes out of a stack of its own, and one for all of one length
that it takes out of one array: an int8 step of 128 slots of llama-3.1-8b has 1,052 operations so, and 1,148 otherwise
(docs/tpu-evidence.md). A program is given the array. Of one that it makes itself, XLA moves all layers' vectors through
VMEM on v6e.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..forward import Params, names_read_whole
from ..models.decoder import Decoder


def joined_shapes(model: Decoder, shapes: Params) -> Params:
    """The parameters' shapes, types and shardings as programs are given them, of those that `load.abstract_params`
    tells: `alike` has an array [G, L, D] for every G vectors of a layer with one length, type and share of a device.
    Unrolled layers have none."""
    layers = shapes["layers"]
    groups = _groups(model, layers) if isinstance(layers, dict) else []
    return _without(shapes, groups) | {
        "alike": {names: _joined_shape([layers[name] for name in names]) for names in groups}
    }


def join(params: Params, shapes: Params) -> Params:
    """Loaded parameters in the form of `shapes`, which `joined_shapes` gave."""
    alike = shapes["alike"]
    if not alike:
        return params | {"alike": {}}
    apart = {names: [params["layers"][name] for name in names] for names in alike}
    shardings = {names: array.sharding for names, array in alike.items()}
    joined = jax.jit(_stacked, out_shardings=shardings)(apart)
    return _without(params, list(alike)) | {"alike": joined}


def _stacked(apart: dict[tuple[str, ...], list[jax.Array]]) -> dict[tuple[str, ...], jax.Array]:
    return {names: jnp.stack(vectors_LD) for names, vectors_LD in apart.items()}


def _groups(model: Decoder, layers: dict[str, Any]) -> list[tuple[str, ...]]:
    """The names of those that lie alike, where there are several."""
    read_whole, groups = names_read_whole(model.layers[0]), dict[Any, list[str]]()
    for name, of in layers.items():
        if len(of.shape) == 2 and name not in read_whole:
            groups.setdefault((of.shape, of.dtype, of.sharding.shard_shape(of.shape)), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _joined_shape(vectors: list[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
    first = vectors[0]
    assert isinstance(first.sharding, NamedSharding)
    sharding = NamedSharding(first.sharding.mesh, PartitionSpec(None, *first.sharding.spec))
    return jax.ShapeDtypeStruct((len(vectors), *first.shape), first.dtype, sharding=sharding)


def _without(params: Params, groups: list[tuple[str, ...]]) -> Params:
    """All but the vectors that these have."""
    taken = {name for names in groups for name in names}
    if not taken:
        return params
    return params | {"layers": {name: of for name, of in params["layers"].items() if name not in taken}}
