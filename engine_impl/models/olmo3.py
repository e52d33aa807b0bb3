"""OLMo 3: an OLMo 2 of which three layers in four have a window, and a rope that is not scaled."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .fields import Fields
from .olmo2 import Olmo2
from .transformer import read_shape, windows_of_layers
from .two_ropes import TwoRopes, read_two_ropes


@dataclass(frozen=True, kw_only=True)
class Olmo3Config(TwoRopes):
    """An OLMo 3's shape."""


LEFT_OUT: dict[str, Any] = {"sliding_window": 4096}
"""Values of fields that a config leaves out, as in transformers' Olmo3Config."""


class Olmo3(Olmo2):
    """Both ropes have one theta in published configs."""

    config_type: ClassVar = Olmo3Config

    @classmethod
    def read_config(cls, fields: Fields) -> Olmo3Config:
        fields = fields.filled(LEFT_OUT)
        fields.only("hidden_act", "silu")
        fields.only("clip_qkv", None)
        shape = read_shape(fields)
        by_number = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(shape["num_layers"])]
        windows = windows_of_layers(fields, fields.get("layer_types", by_number), fields["sliding_window"])
        return Olmo3Config(
            **shape, **read_two_ropes(fields, shape["head_dim"], local_theta="rope_theta"), windows=windows
        )
