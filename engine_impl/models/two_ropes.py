"""Families whose layers with a window have another rope than those that see all."""

from dataclasses import dataclass
from typing import Any

from .fields import Fields
from .rope import Angles, Factors, frequencies
from .rope_scaling import FIXED
from .transformer import TransformerConfig, read_rope


@dataclass(frozen=True, kw_only=True)
class TwoRopes(TransformerConfig):
    """`rope_theta`, `rope_factors` and `rope_scale` are those of layers that see all."""

    local_rope_theta: float
    """Of layers with a window."""
    local_rope_factors: Factors | None = None
    """Likewise."""
    local_rope_scale: float = 1.0
    """Likewise."""

    @property
    def ropes(self) -> tuple[Angles, ...]:
        width = self.rope_width or self.head_dim
        local = Angles(frequencies(width, self.local_rope_theta, self.local_rope_factors), self.local_rope_scale)
        return self.angles, local

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        return tuple(0 if window is None else 1 for window in self.window_of_layer)


def read_two_ropes(fields: Fields, head_dim: int, *, local_theta: str) -> dict[str, Any]:
    """The fields of `TwoRopes`; `local_theta` is where configs of before transformers 5 have that of layers with a
    window, whose rope is not scaled then."""
    every = read_rope(fields, head_dim, layer_type="full_attention")
    if fields.get("rope_parameters") is None:
        return {**every, "local_rope_theta": float(fields[local_theta])}
    local = read_rope(fields, head_dim, FIXED, layer_type="sliding_attention")
    if local["rope_width"] != every["rope_width"]:
        raise fields.refused("turns other parts of a head in layers with a window than in the others")
    return every | {f"local_{name}": local[name] for name in ("rope_theta", "rope_factors", "rope_scale")}
