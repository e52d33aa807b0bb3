"""What a file format offers to whoever loads weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from ..models.decoder import ModelConfig
from ..text.tokenizer import Tokenizer

WEIGHT = "weight"
"""The last part of a matrix's name."""
FLOAT8 = jnp.dtype("float8_e4m3fn")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint keeps its matrices when some other tool has quantised them."""

    weights: Literal["int8", "int4"]
    """int8: a scale for each output; int4: for each group of inputs"""
    group: int | None = None
    """int4: inputs that share a scale, counted in order; None: all of an output's"""
    act_order: bool = False
    """int4: groups are not in order, but chosen input by input"""
    floats: tuple[str, ...] = ()
    """modules that were left as they are: regular expressions of their names in the checkpoint"""

    def leaves(self, module: str) -> bool:
        """Whether it was left as it is."""
        return any(re.fullmatch(pattern, name) for pattern in self.floats for name in (module, f"model.{module}"))


@dataclass(frozen=True)
class Compact:
    """A form of fewer bytes than float32 in which memory holds the very values of a matrix."""

    kind: Literal["bfloat16", "float16", "4-bit", "8-bit", "float8"]
    """floats, or codes: value = code * scale + offset, or table[code] * scale, rounded once to float32"""
    block: int = 0
    """of codes: inputs that share a scale"""
    grid: Literal["float32", "float16"] = "float32"
    """of codes: the type of scales and offsets"""
    has_offset: bool = False
    """of codes; those of 4 bits, which are from 0 to 15, have one or a table"""
    table: tuple[int, ...] = ()
    """the 16 integers of 8 bits that codes of 4 bits stand for; empty: they are numbers themselves"""

    @property
    def is_codes(self) -> bool:
        return self.block > 0


class Codes(NamedTuple):
    """A matrix of codes as a `Compact` describes it: O outputs, I inputs, Q blocks of inputs."""

    code: np.ndarray
    """i8 [O, I], or float8_e4m3fn"""
    scale: np.ndarray
    """[O, Q]"""
    offset: np.ndarray | None
    """[O, Q]"""

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> "Codes":
        """With other rows."""
        code, scale, offset = self
        return Codes(change(code), change(scale), None if offset is None else change(offset))


class Checkpoint(Protocol):
    """What a file format offers. Tensors are called as the model's parameters are (see `Decoder.sources`)."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def quantization(self) -> Quantization | None:
        """What `tensor` decodes and becomes codes anew, those that it was; None where matrices are floats, or count as
        such."""
        ...

    def files(self) -> Sequence[Path]:
        """What the weights follow from, files of weights and of what tells how to read them. None: they come from
        nowhere, and are not worth keeping."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor there is; one that no parameter takes is an error when the weights are loaded."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One of them: an array, or a memory map of which a chip's share is then read."""
        ...

    def compact(self) -> Mapping[str, Compact]:
        """The tensors that have a compact form, by what their headers say; of the others `tensor` alone tells."""
        ...

    def codes(self, name: str) -> Codes:
        """One that `compact` says is codes: `tensor` has its values."""
        ...

    def tokenizer(self) -> Tokenizer: ...
