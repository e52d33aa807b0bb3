"""What every model family offers to the layer loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .fields import Fields

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_RNH, k_RKH, v_RKH) -> out_RNH"""


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


class Decoder(nn.Module):
    """The parts of a decoder-only model, in the order that a step walks them.

    Parameters are named as in Hugging Face checkpoints, without the leading `model.`.
    """

    config_type: ClassVar[type[ModelConfig]]
    """The family's own, by which `registry.build` finds it."""
    shard_axis: ClassVar[dict[str, int]]
    """Module name -> the axis of its weight [out, in] that the chips share; all else is replicated."""

    config: ModelConfig
    embed_tokens: nn.Module
    """token_R -> x_RD"""
    rope: nn.Module
    """position_R -> what the layers take as `rope`"""
    layers: nn.ModuleList
    """(x_RD, rope, attend) -> (x_RD, k_RKH, v_RKH)"""
    norm: nn.Module
    """x_RD -> x_RD"""
    lm_head: nn.Module
    """x_RD -> logits_RV"""

    def __init__(self, config: Any) -> None:
        """`config` is of the family's `config_type`."""
        super().__init__()
        self.config = config

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """The config that a `config.json` describes. Raises RefusedError for what the family cannot do."""
        raise NotImplementedError

    def sources(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that make up a parameter; several are stacked on a new leading axis."""
        return (name,)
