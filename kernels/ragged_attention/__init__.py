"""Decode attention over a cache whose slots have different lengths."""

from .op import ragged_attention

__all__ = ["ragged_attention"]
