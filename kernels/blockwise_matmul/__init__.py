"""Multiplies activations with int4 weights that are never unpacked in memory."""

from .op import blockwise_matmul
from .reference import Blockwise, unpack

__all__ = ["Blockwise", "blockwise_matmul", "unpack"]
