"""Cohere 2 (Command R7B, Command A): a Cohere whose layers have a window and a rope, but for those that see all."""

from dataclasses import dataclass
from typing import ClassVar

from .cohere import Cohere, CohereConfig, read_cohere
from .fields import Fields
from .transformer import read_rope, windows_of_layers


@dataclass(frozen=True, kw_only=True)
class Cohere2Config(CohereConfig):
    """A Cohere 2's shape."""


class Cohere2(Cohere):
    """One layer in four sees all, without a rope."""

    config_type: ClassVar = Cohere2Config

    @classmethod
    def read_config(cls, fields: Fields) -> Cohere2Config:
        fields.only("use_qk_norm", False)
        shape = read_cohere(fields)
        every = fields.get("sliding_window_pattern", 4)
        by_number = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(shape["num_layers"])]
        window = fields.unless_left_out("sliding_window", 4096)
        windows = windows_of_layers(fields, fields.get("layer_types", by_number), window)
        still = tuple(window is None for window in windows)
        return Cohere2Config(**shape, **read_rope(fields, shape["head_dim"]), windows=windows, without_rope=still)
