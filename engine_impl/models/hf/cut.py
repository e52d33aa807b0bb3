"""transformers' forward pass, cut at its layers.

The forward pass itself runs, with stand-ins where the layers and the head are: they see what it makes of embeddings,
what it gives each layer, and what it gives the head. So whatever it does between them is done, and nothing is written
twice.

R rows; to transformers they are a batch of one text of R tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..decoder import Attend, LayerOutput
from ..parts import Linear
from .attention import attending

_HOLE = object()


class _ReachedError(Exception):
    """Ends a forward pass whose rest is not wanted."""


@dataclass(frozen=True)
class Call:
    """How a layer is called, behind its first argument."""

    leaves: tuple[Any, ...]
    """tensors and others, in the order of `tree`"""
    tree: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Call":
        leaves, tree = pytree.tree_flatten((args, dict(kwargs)))
        return cls(tuple(leaves), tree)

    def with_holes(self, places: Sequence[int]) -> "Call":
        """Without its tensors: those in these places are to be filled, the others are masks and become None."""
        leaves = [_HOLE if i in places else leaf for i, leaf in enumerate(self.leaves)]
        return Call(tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves), self.tree)

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """(args, kwargs)"""
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is _HOLE else leaf for leaf in self.leaves], self.tree)


class StandIn(nn.Module):
    """In the place of a layer or of the head, with its attributes."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(of).items() if name not in vars(self)})
        self.answer: Callable[..., Any] = lambda x, *args, **kwargs: x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.answer(x, *args, **kwargs)


class Frame:
    """A model of transformers without its layers and its head."""

    def __init__(self, model: Any, layers: str, returns_tuple: bool) -> None:
        """Args:
        model: of `outside.built`; its layers and its head are taken out.
        layers: the path of the list that they are in.
        returns_tuple: whether a layer's answer is the first of several.
        """
        self.model, self.returns_tuple = model, returns_tuple
        embedding = model.get_input_embeddings()
        self.width: int = embedding.weight.shape[1]
        """of the embedding"""
        real = model.get_submodule(layers)
        self.layers = [StandIn(layer) for layer in real]
        for index, stand_in in enumerate(self.layers):
            real[index] = stand_in
        self.head = StandIn(model.get_output_embeddings())
        model.set_output_embeddings(self.head)
        self.shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if parameter is not embedding.weight
        }
        """Of the parameters that are left, but for the embedding's."""
        self._constants = {name: buffer.numpy() for name, buffer in model.named_buffers()}

    def embedded(self, weights: Mapping[str, Tensor], x_RD: Tensor, position_R: Tensor) -> Tensor:
        """What the first layer gets of embeddings: [R, D]."""
        seen: list[Tensor] = []

        def reached(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(x)
            raise _ReachedError

        self.layers[0].answer = reached
        self._run(weights, x_RD, position_R)
        return seen[0][0]

    def calls(self, position_R: Tensor) -> list[Call]:
        """How each layer is called."""
        calls: list[Call] = []

        def record(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(Call.of(args, kwargs))
            if len(calls) == len(self.layers):
                raise _ReachedError
            return self._answer(x)

        for layer in self.layers:
            layer.answer = record
        self._run({}, torch.zeros((position_R.shape[0], self.width), device=position_R.device), position_R)
        return calls

    def before_head(self, weights: Mapping[str, Tensor], x_RD: Tensor) -> Tensor:
        """What the head gets of what the last layer gave: [R, D]."""
        seen: list[Tensor] = []

        def reached(x: Tensor) -> Any:
            seen.append(x)
            raise _ReachedError

        self.head.answer = reached
        self._behind(weights, x_RD, lambda x: x_RD[None])
        return seen[0][0]

    def behind_head(self, logits_RV: Tensor) -> Tensor:
        """What becomes of the head's logits."""
        self.head.answer = lambda x: logits_RV[None]
        return self._behind({}, logits_RV, lambda x: x).logits[0]

    def _behind(self, weights: Mapping[str, Tensor], rows: Tensor, answer: Callable[[Tensor], Tensor]) -> Any:
        """The forward pass with these answers of layers, of as many rows and of the type of `rows`."""
        for layer in self.layers:
            layer.answer = lambda x, *args, **kwargs: self._answer(answer(x))
        position_R = torch.zeros((len(rows),), device=rows.device, dtype=torch.int32)
        embedding_RD = torch.zeros((len(rows), self.width), device=rows.device, dtype=rows.dtype)
        return self._run(weights, embedding_RD, position_R)

    def _answer(self, x: Tensor) -> Any:
        return (x, None) if self.returns_tuple else x

    def _run(self, weights: Mapping[str, Tensor], x_RD: Tensor, position_R: Tensor) -> Any:
        """The forward pass; weights that are not given are zeros, on which nothing that is wanted may depend. A mask
        that is there is passed on as it is, so none is made."""
        device = x_RD.device
        missing = {name: shape for name, shape in self.shapes.items() if name not in weights}
        zeros = {name: torch.zeros(shape, device=device, dtype=x_RD.dtype) for name, shape in missing.items()}
        constants = {name: torch.tensor(value, device=device) for name, value in self._constants.items()}
        arguments = {
            "inputs_embeds": x_RD[None],
            "position_ids": position_R[None],
            "attention_mask": torch.zeros((1, 1, 1, 1), device=device),
            "use_cache": False,
        }
        try:
            return torch.func.functional_call(
                self.model, {**zeros, **constants, **weights}, (), arguments, tie_weights=False
            )
        except _ReachedError:
            return None


class _Piece(nn.Module):
    """A piece of the frame, with parameters of its own."""

    def __init__(self, frame: Frame, names: Sequence[str] = ()) -> None:
        super().__init__()
        self._frame = (frame,)  # in a tuple, it is no child: it has the parameters of all pieces
        for name in names:
            empty = torch.empty(frame.shapes[name], device="meta")
            self.register_parameter(name.replace(".", "/"), nn.Parameter(empty, requires_grad=False))

    @property
    def frame(self) -> Frame:
        return self._frame[0]

    @property
    def weights(self) -> dict[str, Any]:
        return {name.replace("/", "."): parameter for name, parameter in self._parameters.items()}


class BeforeLayers(_Piece):
    """(x_RD, position_R) -> x_RD"""

    def forward(self, x_RD: Tensor, position_R: Tensor) -> Tensor:
        return self.frame.embedded(self.weights, x_RD, position_R)


class BehindLayers(_Piece):
    """x_RD -> x_RD, for the head"""

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.frame.before_head(self.weights, x_RD)


class BehindHead(_Piece):
    """logits_RV -> logits_RV"""

    def forward(self, logits_RV: Tensor) -> Tensor:
        return self.frame.behind_head(logits_RV)


class Places(_Piece):
    """position_R -> for each of these layers the tensors that it takes beside its rows"""

    def __init__(self, frame: Frame, leaves_of_layer: Mapping[int, Sequence[int]]) -> None:
        """`leaves_of_layer`: which of its call's leaves."""
        super().__init__(frame)
        self.leaves_of_layer = dict(leaves_of_layer)

    def forward(self, position_R: Tensor, reach_R: None = None) -> tuple[tuple[Tensor, ...], ...]:
        calls = self.frame.calls(position_R)
        return tuple(
            tuple(calls[layer].leaves[leaf] for leaf in leaves) for layer, leaves in self.leaves_of_layer.items()
        )


class OuterLayer(nn.Module):
    """A layer of transformers with the face of ours. It has that layer's own children and parameters. It leaves nothing
    to be added."""

    def __init__(self, of: nn.Module, call: Call, kv_heads: int | None = None) -> None:
        """Args:
        call: with holes.
        kv_heads: as the cache has them.
        """
        super().__init__()
        self._modules, self._parameters = of._modules, of._parameters
        self._of, self._call, self._kv_heads = (of,), call, kv_heads
        self._linear = [path for path, module in of.named_modules() if isinstance(module, Linear)]

    def forward(self, x_RD: Tensor, rope: Sequence[Tensor], attend: Attend) -> LayerOutput:
        args, kwargs = self._call.filled(rope)
        hooks = [hook for path in self._linear for hook in _rows_only(self.get_submodule(path))]
        try:
            with attending(attend, self._kv_heads) as current:
                out = self._of[0](x_RD[None], *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        (called,) = current.calls
        x_RD = (out if isinstance(out, Tensor) else out[0])[0]
        return LayerOutput(x_RD, torch.zeros_like(x_RD), called.k_RKH, called.v_RKH)


def _rows_only(linear: nn.Module) -> list[Any]:
    """Hooks by which a linear module gets rows [R, I], as ours take them, whatever axes it is called with."""
    axes: list[tuple[int, ...]] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        axes.append(tuple(args[0].shape[:-1]))
        return (args[0].reshape(-1, args[0].shape[-1]),)

    def behind(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.reshape(*axes.pop(), out.shape[-1])

    return [linear.register_forward_pre_hook(before), linear.register_forward_hook(behind)]
