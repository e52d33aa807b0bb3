"""Decode attention over a cache in pages, whose slots have different lengths."""

from .op import attention_steps, ragged_attention
from .page_sizes import page_rows

__all__ = ["attention_steps", "page_rows", "ragged_attention"]
