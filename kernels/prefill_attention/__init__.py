"""Causal self-attention of one prompt."""

from .op import prefill_attention

__all__ = ["prefill_attention"]
