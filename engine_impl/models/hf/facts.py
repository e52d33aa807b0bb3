"""What the adapter has to know of a model of transformers; probe.py finds it out."""

from dataclasses import dataclass

from .cut import Call
from .names import Names


@dataclass(frozen=True)
class Facts:
    """What the adapter has to know of a model."""

    layers: str
    """the path of the list that its layers are in"""
    returns_tuple: bool
    """whether a layer's answer is the first of several"""
    heads: tuple[int, int, int]
    """query heads, kv heads, head dim"""
    windows: tuple[int | None, ...]
    """of each layer"""
    soft_cap: float | None
    module_of_layer: tuple[int, ...]
    """the layer whose module computes it, with its weights"""
    rope_of_layer: tuple[int, ...]
    """which of `leaves_of_rope` it takes"""
    leaves_of_rope: tuple[tuple[int, tuple[int, ...]], ...]
    """a layer that takes it, and which leaves of its call follow from positions"""
    before: tuple[str, ...]
    """parameters that embeddings meet before the first layer"""
    behind: tuple[str, ...]
    """parameters between the last layer and the head"""
    calls: tuple[Call, ...]
    """how each layer is called, with holes for what follows from positions"""
    names: Names
