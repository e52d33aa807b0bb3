"""Phi-3 to Phi-4-mini: a Mistral whose checkpoints keep q, k and v in one matrix, and gate and up in another."""

from dataclasses import dataclass
from typing import ClassVar

from .decoder import RowRange
from .fields import Fields
from .transformer import Transformer, TransformerConfig, read_rope, read_shape


@dataclass(frozen=True, kw_only=True)
class Phi3Config(TransformerConfig):
    """A Phi-3's shape."""

    stored_kv_heads: int
    """kv heads of the checkpoint; the module may have copies of them, one for each chip."""


NAMES_OF_LONGROPE = {"su": "longrope", "yarn": "longrope"}
"""What configs called it before transformers did."""


class Phi3(Transformer):
    """The matrices are taken apart when they are loaded, since chips share heads and ffn one by one."""

    config_type: ClassVar = Phi3Config
    config: Phi3Config

    def sources(self, name: str) -> tuple[str, ...]:
        path, _, parameter = name.rpartition(".")
        path, _, module = path.rpartition(".")
        q = self.config.num_heads * self.config.head_dim
        kv, ffn = self.config.stored_kv_heads * self.config.head_dim, self.config.ffn_dim
        rows = {
            "q_proj": ("qkv_proj", 0, q),
            "k_proj": ("qkv_proj", q, q + kv),
            "v_proj": ("qkv_proj", q + kv, q + 2 * kv),
            "gate_proj": ("gate_up_proj", 0, ffn),
            "up_proj": ("gate_up_proj", ffn, 2 * ffn),
        }
        if module not in rows:
            return (name,)
        stored, start, stop = rows[module]
        return (RowRange(f"{path}.{stored}.{parameter}", start, stop),)

    @classmethod
    def read_config(cls, fields: Fields) -> Phi3Config:
        fields.only("hidden_act", "silu")
        fields.only("attention_bias", False)
        shape = read_shape(fields)
        rope = read_rope(fields, shape["head_dim"], ("default", "longrope"), also_called=NAMES_OF_LONGROPE)
        windows = (fields.get("sliding_window"),)
        return Phi3Config(**shape, **rope, windows=windows, stored_kv_heads=shape["num_kv_heads"])
