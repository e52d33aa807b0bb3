"""SmolLM3: a Llama of which every fourth layer does not turn its heads."""

from dataclasses import dataclass
from typing import ClassVar

from .fields import Fields
from .transformer import Transformer, TransformerConfig, read_rope, read_shape, shortest_turn, windows_of_layers


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(TransformerConfig):
    """A SmolLM3's shape."""


class SmolLM3(Transformer):
    """Windows are in the family but in no published config."""

    config_type: ClassVar = SmolLM3Config

    @classmethod
    def read_config(cls, fields: Fields) -> SmolLM3Config:
        fields.only("hidden_act", "silu")
        shape = read_shape(fields, tied_embeddings=True)
        without = _without_rope(fields, shape["num_layers"])
        windows = _windows(fields, shape["num_layers"])
        rope = read_rope(fields, shape["head_dim"])
        return SmolLM3Config(**shape, **rope, windows=windows, without_rope=shortest_turn(without))


def _without_rope(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` has a 1 for each layer that has a rope, in spite of its name."""
    every = fields.get("no_rope_layer_interval", 4)
    by_number = [int((i + 1) % every != 0) for i in range(num_layers)]
    has_rope = fields.get("no_rope_layers", by_number)
    if len(has_rope) < num_layers:
        raise fields.refused(f"has no_rope_layers for {len(has_rope)} of {num_layers} layers; fetch it anew")
    return tuple(not has for has in has_rope[:num_layers])


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """A window's size may stand there though `use_sliding_window` is false."""
    if not fields.get("use_sliding_window", False) or fields.get("sliding_window") is None:
        return (None,)
    by_number = ["sliding_attention" if still else "full_attention" for still in _without_rope(fields, num_layers)]
    return windows_of_layers(fields, fields.get("layer_types", by_number), fields["sliding_window"])
