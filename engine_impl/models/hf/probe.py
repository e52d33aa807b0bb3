"""What a model of transformers does, found by running it: whole, then cut, on a few rows and made-up weights.

What could not be right here is refused by name.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import RefusedError
from ..decoder import LayerOutput
from .attention import Called, CannotError, Mask, attending
from .cut import Call, Frame, OuterLayer
from .facts import Facts
from .made_up import MadeUpLinear, by_row, generator_of, made_up
from .names import Names

ROWS = 5
TOLERANCE = 1e-4
"""Of sums in another order."""


def probed(model: Any, count: int, where: str) -> Facts:
    """The facts of a model that `outside.built` gave; it is of no more use then.

    Args:
        count: of its layers.

    Raises RefusedError.
    """
    try:
        with MadeUpLinear(), torch.no_grad():
            return _Probe(model, count).facts()
    except CannotError as error:
        raise RefusedError(f"{where!r} is of a model {error}; it needs a module of ours") from error
    except Exception as error:  # whatever stands in others' code
        raise RefusedError(
            f"{where!r} is of a model whose layers do not run by themselves "
            f"({type(error).__name__}: {str(error)[:200]}); it needs a module of ours"
        ) from error


class _Seen(NamedTuple):
    """A layer in the whole model."""

    call: Call
    attended: list[Called]
    returned_tuple: bool


class _Probe:
    """One model."""

    def __init__(self, model: Any, count: int) -> None:
        self.model = model
        self.path = _layers_path(model, count)
        self.names = Names(model, self.path)
        if any(hasattr(module, "is_concatenated") for module in model.modules()):
            raise CannotError("with experts, which are there for families with a module of ours alone")
        self.layers = list(model.get_submodule(self.path))
        self.token_R = torch.arange(ROWS) % 4 + 1
        self.weights = {
            name: made_up(name, parameter, rows_differ=not name.startswith(f"{self.path}."))
            for name, parameter in model.named_parameters()
        }
        embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.table = torch.randn((8, embedding.weight.shape[1]), generator=generator_of("table"))
        named = dict(model.named_parameters(remove_duplicate=False))
        self.weights |= {path: self.table for path, parameter in named.items() if parameter is embedding.weight}
        self.head_weights = {
            name: self.weights[path]
            for name, of_head in self.head.named_parameters()
            for path, parameter in named.items()
            if parameter is of_head
        }
        embedding.padding_idx = None  # of no account but in training
        for layer in self.layers:
            _drop_constants(layer)

    def facts(self) -> Facts:
        seen, logits_RV = self._whole()
        windows, caps, heads = self._attention(seen)
        self.frame = Frame(self.model, self.path, seen[0].returned_tuple)
        self.outer = {name: self.weights[name] for name in self.frame.shapes}
        calls = self.frame.calls(torch.arange(ROWS))
        leaves = [_from_positions(one.call, call) for one, call in zip(seen, calls, strict=True)]
        ropes = [tuple(id(call.leaves[leaf]) for leaf in places) for call, places in zip(calls, leaves, strict=True)]
        first = [ropes.index(rope) for rope in ropes]
        rope_layers = sorted(set(first))
        self.leaves_of_layer = leaves
        self.calls = tuple(call.with_holes(places) for call, places in zip(calls, leaves, strict=True))
        before, behind = self._sides()
        self._check(logits_RV)
        modules = self._modules(calls)
        for index in set(modules):
            self._compile(index, calls[index])
        return Facts(
            layers=self.path,
            returns_tuple=seen[0].returned_tuple,
            heads=heads,
            windows=windows,
            soft_cap=caps,
            module_of_layer=modules,
            rope_of_layer=tuple(rope_layers.index(layer) for layer in first),
            leaves_of_rope=tuple((layer, leaves[layer]) for layer in rope_layers),
            before=before,
            behind=behind,
            calls=self.calls,
            names=self.names,
        )

    def _whole(self) -> tuple[list[_Seen], Tensor]:
        """The model as transformers runs it: each layer, and the logits."""
        seen: list[_Seen] = []
        begun: list[tuple[Call, int]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begun.append((Call.of(args[1:], kwargs), len(current.calls)))

        def behind(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            call, first = begun.pop()
            seen.append(_Seen(call, current.calls[first:], not isinstance(out, Tensor)))

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        hooks += [layer.register_forward_hook(behind) for layer in self.layers]
        arguments = {"input_ids": self.token_R[None], "use_cache": False}
        with attending(by_row) as current:
            logits = torch.func.functional_call(self.model, self.weights, (), arguments, tie_weights=False).logits
        for hook in hooks:
            hook.remove()
        if len(seen) != len(self.layers):
            raise CannotError(f"that runs {len(seen)} of its {len(self.layers)} layers")
        if len(current.calls) > len(seen):
            raise CannotError("that attends outside of its layers, or several times in one (cross attention)")
        return seen, logits[0]

    def _attention(self, seen: list[_Seen]) -> tuple[tuple[int | None, ...], float | None, tuple[int, int, int]]:
        """(windows, soft cap, heads); refuses layers that keep anything else of a text."""
        windows, caps, heads = [], set(), set()
        for layer, one in zip(self.layers, seen, strict=True):
            if len(one.attended) != 1:
                raise CannotError(
                    f"whose {type(layer).__name__} does not attend by transformers' attention functions: it has a "
                    "state of its own, or scores of its own"
                )
            (called,) = one.attended
            if not isinstance(called.mask, Mask):
                raise CannotError("whose attention has a mask that transformers' own functions did not make")
            windows.append(called.mask.window)
            caps.add(called.soft_cap)
            heads.add((called.query_heads, *called.k_RKH.shape[1:]))
        if len(caps | heads) != 2:
            raise CannotError(
                f"whose layers have other heads or score caps than one another: {sorted(map(str, heads))}"
            )
        return tuple(windows), caps.pop(), heads.pop()

    def _sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the parameters before the first layer, and behind the last: what becomes NaN with them."""
        position_R, x_RD = torch.arange(ROWS), self.table[self.token_R]
        y_RD = self.frame.embedded(self.outer, x_RD, position_R)
        before, behind = [], []
        for name, shape in self.frame.shapes.items():
            spoiled = {**self.outer, name: torch.full(shape, torch.nan)}
            if self.frame.embedded(spoiled, x_RD, position_R).isnan().any():
                before.append(name)
            if self.frame.before_head(spoiled, y_RD).isnan().any():
                behind.append(name)
        if idle := set(self.frame.shapes) - {*before, *behind}:
            raise CannotError(f"with parameters that play no part between its layers, such as {min(idle)}")
        return tuple(before), tuple(behind)

    def _check(self, logits_RV: Tensor) -> None:
        """The pieces give what the whole gave, and each row alone what it gives among the others."""
        if not _close(self._cut(torch.arange(ROWS)), logits_RV):
            raise CannotError("that does more between its layers than can be seen from outside")
        for row in (0, ROWS // 2, ROWS - 1):
            row_1 = torch.tensor([row])
            if not _close(self._cut(row_1), logits_RV[row_1]):
                raise CannotError("whose layers mix tokens in other ways than attention: they would need a state")

    def _cut(self, position_R: Tensor) -> Tensor:
        """Logits of some of the rows, piece by piece."""
        x_RD = self.frame.embedded(self.outer, self.table[self.token_R[position_R]], position_R)
        for index, call in enumerate(self.frame.calls(position_R)):
            rope = [call.leaves[leaf] for leaf in self.leaves_of_layer[index]]
            x_RD = self._layer(index, index, x_RD, rope).x_RD
        logits_RV = torch.func.functional_call(self.head, self.head_weights, self.frame.before_head(self.outer, x_RD))
        return self.frame.behind_head(logits_RV)

    def _layer(self, index: int, by: int, x_RD: Tensor, rope: list[Tensor]) -> LayerOutput:
        """A layer, computed by another one's module."""
        prefix = f"{self.path}.{index}."
        weights = {name.removeprefix(prefix): of for name, of in self.weights.items() if name.startswith(prefix)}
        outer = OuterLayer(self.layers[by], self.calls[index])
        return torch.func.functional_call(outer, weights, (x_RD, rope, by_row), strict=True)

    def _compile(self, index: int, call: Call) -> None:
        """A layer has to do without its rows' values: programs are compiled before there are any."""
        width = self.frame.embedded(self.outer, self.table[self.token_R], torch.arange(ROWS)).shape[1]
        rope = [call.leaves[leaf].to("meta") for leaf in self.leaves_of_layer[index]]
        try:
            OuterLayer(self.layers[index], self.calls[index])(torch.empty((ROWS, width), device="meta"), rope, by_row)
        except (RuntimeError, NotImplementedError) as error:
            kind = type(self.layers[index]).__name__
            raise CannotError(f"whose {kind} goes by its rows' values, as experts do ({error})") from error

    def _modules(self, calls: list[Call]) -> tuple[int, ...]:
        """For each layer the first one that is like it: it does the same to the same rows with the same weights."""
        x_RD = torch.randn(
            (ROWS, self.frame.embedded(self.outer, self.table[self.token_R], torch.arange(ROWS)).shape[1])
        )
        modules: list[int] = []
        for index, layer in enumerate(self.layers):
            rope = [calls[index].leaves[leaf] for leaf in self.leaves_of_layer[index]]
            own = self._layer(index, index, x_RD, rope)
            for other in sorted(set(modules)):
                same = self.calls[other] == self.calls[index] and _shapes(self.layers[other]) == _shapes(layer)
                if same and all(map(_close, self._layer(index, other, x_RD, rope), own)):
                    modules.append(other)
                    break
            else:
                modules.append(index)
        return tuple(modules)


def _layers_path(model: nn.Module, count: int) -> str:
    lists = [path for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise CannotError(f"with {len(outermost)} lists of {count} layers, of which there has to be one")
    return outermost[0]


def _from_positions(whole: Call, cut: Call) -> tuple[int, ...]:
    """Which leaves of a call are tensors, but for its masks."""
    if whole.tree != cut.tree:
        raise CannotError("whose layers are called in one way with a mask and in another without")
    return tuple(
        place
        for place, (leaf, of_whole) in enumerate(zip(cut.leaves, whole.leaves, strict=True))
        if isinstance(leaf, Tensor) and not isinstance(of_whole, Mask)
    )


def _drop_constants(layer: nn.Module) -> None:
    """What is not there cannot be used: such as GPT-2's causal masks, which its own attention takes alone."""
    for module in layer.modules():
        module._buffers.clear()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)
