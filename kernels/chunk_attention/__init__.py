"""Chunk attention: a chunk of a text over the text's pages and over itself."""

from .op import chunk_attention

__all__ = ["chunk_attention"]
