"""What a file format offers to whoever loads weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ..models.decoder import ModelConfig
from ..text.tokenizer import Tokenizer

WEIGHT = "weight"
"""The last part of a matrix's name."""


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
        """What `tensor` decodes; None where matrices are floats, or count as such."""
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

    def tokenizer(self) -> Tokenizer: ...
