"""Multiplies activations with int4 weights that are never unpacked in memory."""

from .op import Split, blockwise_matmul
from .reference import Blockwise, unpack

__all__ = ["Blockwise", "Split", "blockwise_matmul", "unpack"]
