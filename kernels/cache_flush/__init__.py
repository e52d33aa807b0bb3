"""Writes a step's new tokens into the cache, in place."""

from .op import cache_flush

__all__ = ["cache_flush"]
