"""What every model family offers to the layer loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor, nn

from .fields import Fields


class Attend(Protocol):
    """Attention over what came before each row, and itself."""

    def __call__(self, q_RNH: Tensor, k_RKH: Tensor, v_RKH: Tensor, sink_N: Tensor | None = None, /) -> Tensor:
        """out_RNH, softmax of q . k times H**-0.5. `sink_N`: a score of each head that takes its share of the weights
        and adds nothing."""
        ...


class LayerOutput(NamedTuple):
    """What a layer gives. The residual stream behind it is x_RD + out_RD: the layer loop adds them."""

    x_RD: Tensor
    """the stream before the last thing that the layer adds to it"""
    out_RD: Tensor
    """what is still to be added"""
    k_RKH: Tensor
    """as the cache shall hold it, rope applied"""
    v_RKH: Tensor


def split_name(name: str) -> tuple[str, str, str]:
    """(path with its last dot, or nothing; module; parameter) of a parameter's name."""
    *path, module, parameter = name.split(".")
    return "".join(f"{part}." for part in path), module, parameter


class RowRange(str):
    """The name of a checkpoint's tensor of which a parameter is rows [start, stop)."""

    start: int
    stop: int

    def __new__(cls, name: str, start: int, stop: int) -> "RowRange":
        rows = super().__new__(cls, name)
        rows.start, rows.stop = start, stop
        return rows


class Pairs(str):
    """The name of a checkpoint's tensor with an axis of heads for a rope that turns neighbours (2i, 2i+1), in the first
    `width` of each head's `head_dim` dimensions. The model has them in the order of ours, which turns halves
    (i, i + width/2): scores do not change when q and k are reordered alike."""

    head_dim: int
    width: int
    axis: int

    def __new__(cls, name: str, head_dim: int, width: int, axis: int = 0) -> "Pairs":
        pairs = super().__new__(cls, name)
        pairs.head_dim, pairs.width, pairs.axis = head_dim, width, axis
        return pairs

    def order(self, size: int) -> list[int]:
        """Where each entry of the model's axis, of that size, is along the checkpoint's."""
        of_head = [*range(0, self.width, 2), *range(1, self.width, 2), *range(self.width, self.head_dim)]
        return [first + i for first in range(0, size, self.head_dim) for i in of_head]


class Transposed(str):
    """The name of a checkpoint's matrix that the model keeps as [in, out]."""


@dataclass(frozen=True)
class Part:
    """Which part of a checkpoint's tensor goes by a name of its own."""

    index: tuple[int | slice, ...]
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes that the engine needs; a family adds its own."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tied_embeddings: bool
    windows: tuple[int | None, ...] = (None,)
    """How many tokens a layer sees, the row's own included; None is all. Layers take turns: it starts over at its end,
    so that one entry stands for all layers, two for every other one."""
    attn_soft_cap: float | None = None
    """Attention scores become cap * tanh(score / cap)."""

    @property
    def window_of_layer(self) -> tuple[int | None, ...]:
        """`windows`, one a layer."""
        return tuple(self.windows[i % len(self.windows)] for i in range(self.num_layers))

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        """Which of the module's ropes each layer takes; most families have one."""
        return (0,) * self.num_layers

    def for_length(self, length: int) -> Self:
        """The config of a server whose requests have at most `length` tokens: without what only longer ones need."""
        return self

    def reach_of(self, length: int) -> int:
        """Which angles a text takes that may come to `length` tokens, by the shortest length that takes the same ones;
        0: those that the rope was trained with. Of most models all texts do."""
        return 0


class Anywhere(nn.Module):
    """What is done to rows alike, wherever in a text they stand."""

    def __init__(self, change: nn.Module) -> None:
        super().__init__()
        self.change = change

    def forward(self, x_RD: Tensor, position_R: Tensor) -> Tensor:
        return self.change(x_RD)


class Decoder(nn.Module):
    """The parts of a decoder-only model, in the order that a step walks them.

    Parameters are named as in Hugging Face checkpoints, without the leading `model.` (see `prefixes`); where a name has
    to differ, `sources` tells which tensors it stands for.
    """

    config_type: ClassVar[type[ModelConfig]]
    """The family's own, by which `registry.build` finds it."""
    shard_axis: ClassVar[dict[str, int | tuple[int, ...]]]
    """Module name -> the axis of its weight [out, in] that the chips share, or several of which they share the first
    that they divide; all else is replicated."""
    of_kv_heads: ClassVar[tuple[str, ...]] = ("k_proj", "v_proj")
    """Names of modules whose parameters have a part for each kv head along their first axis. With fewer kv heads than
    chips, these parts are repeated."""
    prefixes: ClassVar[tuple[str, ...]] = ("model.",)
    """What may stand before the parameters' names in a Hugging Face checkpoint; the first that fits is taken off."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """How the names of tensors begin, prefixes taken off, that a checkpoint may hold beside this model. Any other that
    no parameter takes is refused."""

    config: ModelConfig
    embed_tokens: nn.Module
    """token_R -> x_RD"""
    after_embedding: nn.Module
    """(x_RD, position_R) -> x_RD; may have parameters"""
    rope: nn.Module
    """(position_R, reach_R or None) -> a tuple; each layer takes the entry that `config.rope_of_layer` names. All of
    one shape."""
    layers: nn.ModuleList
    """(x_RD, rope, attend) -> LayerOutput; all alike but for their weights, see `module_of_layer`"""
    norm: nn.Module
    """x_RD -> x_RD"""
    lm_head: nn.Module
    """x_RD -> logits_RV"""
    after_logits: nn.Module
    """logits_RV -> logits_RV"""

    def __init__(self, config: Any) -> None:
        """`config` is of the family's `config_type`. A family sets the other parts itself."""
        super().__init__()
        self.config = config
        self.after_embedding = Anywhere(nn.Identity())
        self.after_logits = nn.Identity()

    @property
    def module_of_layer(self) -> tuple[int, ...]:
        """For each layer the one whose module computes it, with its own weights: of most families the first for all.
        Where there are several, layers are not stacked."""
        return (0,) * len(self.layers)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """The config that a `config.json` describes. Raises RefusedError for what the family cannot do."""
        raise NotImplementedError

    @classmethod
    def own_name(cls, config: Any, name: str) -> str:
        """The name of a tensor, or of a module, in a Hugging Face checkpoint as ours; `config` is of `config_type`."""
        return name.removeprefix(next((prefix for prefix in cls.prefixes if name.startswith(prefix)), ""))

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may hold a tensor of this name, own_name taken, beside this model."""
        return name.startswith(self.ignored)

    def shared_axis(self, module: str, shape: Sequence[int], chips: int) -> int | None:
        """The axis of a module's parameter of this shape that so many chips share; None: each has a copy."""
        axes = self.shard_axis.get(module, ())
        axes = (axes,) if isinstance(axes, int) else axes
        return next((axis for axis in axes if axis < len(shape) and shape[axis] % chips == 0), None)

    def parameters_in(self, name: str) -> tuple[str, ...]:
        """The parameters, by the names that the family knows, that are in the one of this name: itself or, of a module
        that stands for several (`stands_for`), theirs, on a leading axis."""
        path, _, parameter = name.rpartition(".")
        stands_for: tuple[str, ...] = getattr(self.get_submodule(path), "stands_for", ())
        parent, _, _ = path.rpartition(".")
        return tuple(f"{parent}.{module}.{parameter}" for module in stands_for) or (name,)

    @classmethod
    def parts_of(cls, name: str, shape: tuple[int, ...]) -> Mapping[str, Part | None]:
        """The names by which `sources` asks for a tensor of a Hugging Face folder, prefixes taken off: its own, or one
        for each part of it; None is all of it."""
        return {name: None}

    def sources(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that make up a parameter; several are stacked on a new leading axis; see also
        `RowRange`, `Pairs` and `Transposed`."""
        return (name,)
