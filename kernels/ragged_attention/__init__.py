"""Decode attention over a cache whose slots have different lengths."""

from .op import attention_steps, ragged_attention

__all__ = ["attention_steps", "ragged_attention"]
