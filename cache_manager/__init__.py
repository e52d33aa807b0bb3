"""The stacked KV cache: its layout, and the two places where it changes, insert and flush."""

from .cache import insert
from .layout import CACHE_SPEC, PREFIX_SPEC, CacheLayout
from .new_tokens import flush, rows

__all__ = ["CACHE_SPEC", "PREFIX_SPEC", "CacheLayout", "flush", "insert", "rows"]
