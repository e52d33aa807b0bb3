"""A model's parameters on their devices, or only their shapes.

Tensors go one by one from the file to the devices that hold them: the host never holds more than a few.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import nn

from ..checkpoints.by_rows import all_finite, copied, stacked
from ..checkpoints.contract import WEIGHT, Checkpoint, Codes
from ..checkpoints.sources import repeat_heads, taken
from ..errors import RefusedError
from ..forward import LayerLoop, Params, stacked_parts
from ..models.decoder import Decoder, RowRange, Transposed
from ..quantization.linear import EncodedModule
from .sharding import parameter_spec

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
BENIGN = "rotary_emb.inv_freq"
"""Older checkpoints store the rope's frequencies, which follow from the config."""

COMPARED_ROWS = 1024
NAMES_TOLD = 8


def load_params(model: Decoder, checkpoint: Checkpoint, mesh: Mesh, dtype: jnp.dtype, loop: LayerLoop) -> Params:
    """Read every parameter of the model from the checkpoint, once, and put it on the devices that hold it.

    Raises RefusedError, naming them, when tensors are missing, left over, of another shape or not finite: weights are
    never wrong in silence.
    """
    check_names(model, checkpoint)
    loader = _Loader(model, checkpoint, dtype)
    params = _build(model, mesh, loop, loader)
    loader.check_finite()
    return params


def abstract_params(model: Decoder, mesh: Mesh, dtype: jnp.dtype, loop: LayerLoop) -> Params:
    """The parameters' shapes, types and shardings, without their memory."""
    return _build(model, mesh, loop, _Describer(dtype))


def needed_shapes(model: Decoder, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of this model has to have; `kv_heads` as they are there, not repeated."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _apart(model):
        if name == HEAD and model.config.tied_embeddings:
            continue
        sources = model.sources(name)
        if _of_kv_heads(model, name):
            shape = (shape[0] * kv_heads // model.config.num_kv_heads, *shape[1:])
        for source in sources:
            of_source = shape if len(sources) == 1 else shape[1:]
            if isinstance(source, Transposed):
                of_source = of_source[::-1]
            if isinstance(source, RowRange):  # other parameters take the others
                of_source = (max(source.stop, shapes.get(source, (0,))[0]), *of_source[1:])
            shapes[str(source)] = of_source
    return shapes


def _apart(model: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """`float_shapes` by the names that the family knows."""
    for name, shape in float_shapes(model).items():
        ones = model.parameters_in(name)
        yield from ((one, shape if len(ones) == 1 else shape[1:]) for one in ones)


def float_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters as they were before anything was quantised."""
    encoded = {path: part for path, part in model.named_modules() if isinstance(part, EncodedModule)}
    stored = {_join(path, name) for path, part in encoded.items() for name in part.stored}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in stored}
    return shapes | {_join(path, WEIGHT): part.float_shape for path, part in encoded.items()}


def matrices(model: Decoder, mesh: Mesh) -> Iterator[tuple[nn.Module, int]]:
    """(module, elements of its weight on one device), of each matrix that rows are multiplied with: the embedding is
    one only as a tied head."""
    for name, shape in float_shapes(model).items():
        if len(shape) < 2 or name == EMBEDDING:
            continue
        part = model.get_submodule(name.rpartition(".")[0])
        if isinstance(part, EncodedModule):
            spec = part.float_spec
        else:
            lies_as = EMBEDDING if name == HEAD and model.config.tied_embeddings else name
            spec = parameter_spec(model, lies_as, shape, mesh)
        yield part, math.prod(NamedSharding(mesh, spec).shard_shape(shape))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def check_names(model: Decoder, checkpoint: Checkpoint) -> None:
    """Raises one RefusedError with all that does not agree; reads no weights, except those of a doubled lm_head."""
    there, needed = checkpoint.shapes(), needed_shapes(model, checkpoint.config.num_kv_heads)
    extra = {name for name in there if name not in needed and not name.endswith(BENIGN)}
    extra = {name for name in extra if not model.ignores(name)}
    if model.config.tied_embeddings and HEAD in extra:
        _check_tied(checkpoint, there, model.sources(EMBEDDING)[0])
        extra.remove(HEAD)
    if checkpoint.quantization is not None:  # some tools give every module a bias
        extra = {name for name in extra if not name.endswith(".bias") or checkpoint.tensor(name).any()}
    misshapen = [
        f"{name} is {there[name]}, the model needs {shape}"
        for name, shape in needed.items()
        if name in there and there[name] != shape
    ]
    faults = {
        "missing": [name for name in needed if name not in there],
        "unexpected": sorted(extra),
        "of another shape": misshapen,
    }
    told = [f"{fault}: {_told(names)}" for fault, names in faults.items() if names]
    if told:
        raise RefusedError(f"{checkpoint.name} does not fit the model that its config describes; {'; '.join(told)}")


def _told(names: list[str]) -> str:
    more = len(names) - NAMES_TOLD
    return ", ".join(names[:NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


def _check_tied(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], embedding_name: str) -> None:
    """A copy of the embedding may be there too; anything else may not."""
    same = shapes[HEAD] == shapes.get(embedding_name)
    if same:
        head, embedding = checkpoint.tensor(HEAD), checkpoint.tensor(embedding_name)
        same = all(
            (head[rows].astype(np.float32) == embedding[rows].astype(np.float32)).all()
            for rows in (slice(row, row + COMPARED_ROWS) for row in range(0, len(head), COMPARED_ROWS))
        )
    if not same:
        raise RefusedError(
            f"{checkpoint.name} has a {HEAD} of its own, but its config ties it to the embedding "
            "(tie_word_embeddings); one of the two is wrong"
        )


def _of_kv_heads(model: Decoder, name: str) -> bool:
    return name.split(".")[-2] in model.of_kv_heads


@dataclass(frozen=True)
class _Leaf:
    """One array of `Params`."""

    names: list[tuple[str, ...]]
    """the parameters in it: of one layer, or of every one, stacked; see `Decoder.parameters_in`"""
    shape: tuple[int, ...]
    """of a layer's"""
    spec: PartitionSpec
    mesh: Mesh
    stacked: bool

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (len(self.names), *self.shape) if self.stacked else self.shape

    @property
    def has_several(self) -> bool:
        """Whether a layer has several parameters in it, along the first axis of `shape`."""
        return len(self.names[0]) > 1

    @property
    def of_parameter(self) -> "_Leaf":
        """As it were if each had one of its own."""
        return replace(self, shape=self.shape[1:], spec=PartitionSpec(*self.spec[1:])) if self.has_several else self

    @property
    def places(self) -> list[tuple[str, tuple[int, ...]]]:
        """(parameter, its indices along the leading axes), of all in it."""
        return [
            (name, ((layer,) if self.stacked else ()) + ((i,) if self.has_several else ()))
            for layer, names in enumerate(self.names)
            for i, name in enumerate(names)
        ]

    @property
    def of_one(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec)

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(None, *self.spec)) if self.stacked else self.of_one


class _Loader:
    """Moves tensors, at most two at a time on their way, and remembers which were not finite. The host looks, at what
    it has just read or converted: no program has to be compiled for each shape."""

    def __init__(self, model: Decoder, checkpoint: Checkpoint, dtype: jnp.dtype) -> None:
        self._model, self._checkpoint, self._dtype = model, checkpoint, dtype
        self._finite: dict[str, bool] = {}
        self._sent: Any = ()  # what was read last

    def plain(self, leaf: _Leaf) -> jax.Array:
        """A leaf as the checkpoint has it."""
        one = leaf.of_parameter

        def read(name: str) -> Mapping[str, jax.Array]:
            return self._paced({"": self._array(name, one, self._dtype)})

        return self._assembled(leaf, {"": leaf}, read)[""]

    def encoded(self, leaf: _Leaf, parts: dict[str, "_Leaf"], module: EncodedModule) -> dict[str, jax.Array]:
        """The arrays that stand for `leaf`."""
        one = leaf.of_parameter

        def read(name: str) -> Mapping[str, jax.Array]:
            if module.by_expert:
                return self._by_expert(name, module)
            if module.keeps_codes:
                (source,) = self._model.sources(name)
                return self._paced(module.encode_codes(self._codes(name, source)))
            return self._paced(module.encode(self._array(name, one, module.source)))

        return self._assembled(leaf, parts, read)

    def _by_expert(self, name: str, module: EncodedModule) -> dict[str, jax.Array]:
        """The arrays of all experts' matrices, which are read one by one."""

        def read(source: str) -> Mapping[str, jax.Array]:
            if module.keeps_codes:  # the model's [in, out] is their [out, in]
                return self._paced(module.encode_codes(self._codes(name, str(source))))
            weight_OI = copied(taken(self._checkpoint.tensor(source), source).T, module.source)
            self._look_at(name, weight_OI)
            return self._paced(module.encode(jnp.asarray(weight_OI)))

        stacks = _zeros({name: jax.ShapeDtypeStruct(of.shape, of.dtype) for name, of in module.stored.items()})
        put = jax.jit(_put, donate_argnums=0)
        for expert, source in enumerate(self._model.sources(name)):
            stacks = put(stacks, dict(read(source)), (expert,))
        return stacks

    def _assembled(
        self, leaf: _Leaf, parts: dict[str, _Leaf], read: Callable[[str], Mapping[str, jax.Array]]
    ) -> dict[str, jax.Array]:
        """What `read` gives of each parameter in the leaf; where there are several its arrays are filled in place, one
        by one."""
        places = leaf.places
        first = read(places[0][0])
        if not places[0][1]:
            return {name: jax.device_put(first[name], part.of_one) for name, part in parts.items()}
        shapes = {
            name: jax.ShapeDtypeStruct(part.full_shape, first[name].dtype, sharding=part.sharding)
            for name, part in parts.items()
        }
        stacks = _zeros(shapes)
        put = jax.jit(_put, donate_argnums=0, out_shardings={name: part.sharding for name, part in parts.items()})
        for i, (name, index) in enumerate(places):
            stacks = put(stacks, dict(first if i == 0 else read(name)), index)
        return stacks

    def check_finite(self) -> None:
        finite = np.array(list(self._finite.values()))
        if jax.process_count() > 1:  # each host has looked at its devices' shares
            finite = np.all(multihost_utils.process_allgather(finite), axis=0)
        faulty = [name for name, is_finite in zip(self._finite, finite, strict=True) if not is_finite]
        if faulty:
            raise RefusedError(
                f"{self._checkpoint.name} has values that are NaN or infinite as {self._dtype.name}: {_told(faulty)}; "
                "fetch it anew, or give another --dtype"
            )

    def _array(self, name: str, leaf: _Leaf, dtype: jnp.dtype) -> jax.Array:
        """One parameter. Every device's share is read for itself, so that no more of a memory map is touched."""
        self._finite.setdefault(name, True)
        sources = [
            self._repeated(name, taken(self._checkpoint.tensor(source), source)) for source in self._model.sources(name)
        ]

        def share(index: Any) -> np.ndarray:
            if len(sources) == 1:
                array = copied(sources[0][index], dtype)
            else:
                array = stacked([source[index[1:]] for source in sources[index[0]]], dtype)
            self._look_at(name, array)
            return array

        return jax.make_array_from_callback(leaf.shape, leaf.of_one, share)

    def _codes(self, name: str, source: str) -> Codes:
        """A parameter's, or a part of it, of which the checkpoint has codes."""
        codes = self._checkpoint.codes(source).each(lambda rows: self._repeated(name, taken(rows, source)))
        for array in codes:
            if array is not None and array.dtype != np.int8:
                self._look_at(name, array)
        return codes

    def _repeated(self, name: str, array: np.ndarray) -> np.ndarray:
        if not _of_kv_heads(self._model, name):
            return array
        return repeat_heads(array, self._checkpoint.config.num_kv_heads, self._model.config.num_kv_heads)

    def _look_at(self, name: str, array: np.ndarray) -> None:
        """Remembers whether all that has been seen of a parameter is finite."""
        self._finite[name] = all_finite(array) and self._finite.get(name, True)

    def _paced(self, arrays: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """The same, once what was read before them is on its device."""
        before, self._sent = self._sent, arrays
        jax.block_until_ready(before)
        return arrays


def _zeros(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """All of them by one program."""
    return _maker_of_zeros(tuple(shapes.items()))()


@functools.cache
def _maker_of_zeros(shapes: tuple[tuple[str, jax.ShapeDtypeStruct], ...]) -> Callable[[], dict[str, jax.Array]]:
    """One for all leaves of these shapes, so that it is compiled once."""
    return jax.jit(
        lambda: {name: jnp.zeros(of.shape, of.dtype) for name, of in shapes},
        out_shardings={name: of.sharding for name, of in shapes},
    )


def _put(
    stacks: dict[str, jax.Array], arrays: dict[str, jax.Array], index: tuple[jax.Array, ...]
) -> dict[str, jax.Array]:
    """With the arrays at these indices along the leading axes."""

    def put(stack: jax.Array, array: jax.Array) -> jax.Array:
        update = jnp.expand_dims(array, tuple(range(len(index))))
        return jax.lax.dynamic_update_slice(stack, update, (*index, *[0] * array.ndim))

    return jax.tree.map(put, stacks, arrays)


class _Describer:
    """Makes shapes, types and shardings."""

    def __init__(self, dtype: jnp.dtype) -> None:
        self._dtype = dtype

    def plain(self, leaf: _Leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.full_shape, self._dtype, sharding=leaf.sharding)

    def encoded(self, leaf: _Leaf, parts: dict[str, _Leaf], module: EncodedModule) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(part.full_shape, module.stored[name].dtype, sharding=part.sharding)
            for name, part in parts.items()
        }


def _build(model: Decoder, mesh: Mesh, loop: LayerLoop, maker: "_Loader | _Describer") -> Params:
    """The tree of `forward.Params`, every leaf made by the maker."""

    in_stacks = stacked_parts(model) if loop == "unrolled" else ()

    def section(
        module: nn.Module, prefixes: list[str], stacked: bool = False, without: Sequence[str] = ()
    ) -> dict[str, Any]:
        """All but the encoded parts `without`."""

        def leaf(name: str, shape: tuple[int, ...], spec: PartitionSpec | None = None) -> _Leaf:
            names = [f"{prefix}.{name}" for prefix in prefixes]
            spec = spec or parameter_spec(model, names[0], shape, mesh)
            return _Leaf([model.parameters_in(one) for one in names], shape, spec, mesh, stacked)

        encoded = {path: part for path, part in module.named_modules() if isinstance(part, EncodedModule)}
        stored = {_join(path, name) for path, part in encoded.items() for name in part.stored}
        made = {
            name: maker.plain(leaf(name, tuple(parameter.shape)))
            for name, parameter in module.named_parameters()
            if name not in stored
        }
        for path, part in encoded.items():
            if path not in without:
                made |= encoded_part(path, part, prefixes, stacked)
        return made

    def encoded_part(path: str, part: EncodedModule, prefixes: list[str], stacked: bool) -> dict[str, Any]:
        def leaf(name: str, shape: tuple[int, ...], spec: PartitionSpec) -> _Leaf:
            names = [f"{prefix}.{_join(path, name)}" for prefix in prefixes]
            return _Leaf([model.parameters_in(one) for one in names], shape, spec, mesh, stacked)

        parts = {name: leaf(name, of.shape, of.spec(part.axis)) for name, of in part.stored.items()}
        made = maker.encoded(leaf(WEIGHT, part.float_shape, part.float_spec), parts, part)
        return {_join(path, name): array for name, array in made.items()}

    layer_names, stacks = [f"layers.{i}" for i in range(len(model.layers))], dict[str, Any]()
    if loop == "scan":
        layers = section(model.layers[0], layer_names, stacked=True)
    else:
        layers = tuple(
            section(layer, [name], without=in_stacks) for layer, name in zip(model.layers, layer_names, strict=True)
        )
        for path, part in model.layers[0].named_modules():
            if path in in_stacks and isinstance(part, EncodedModule):
                stacks |= encoded_part(path, part, layer_names, True)
    embed_tokens = section(model.embed_tokens, ["embed_tokens"])
    return {
        "embed_tokens": embed_tokens,
        "after_embedding": section(model.after_embedding, ["after_embedding"]),
        "layers": layers,
        "stacks": stacks,
        "norm": section(model.norm, ["norm"]),
        "lm_head": embed_tokens if model.config.tied_embeddings else section(model.lm_head, ["lm_head"]),
    }
