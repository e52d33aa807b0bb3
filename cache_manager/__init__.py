"""The stacked KV cache: its layout, and the two places where it changes, insert and flush."""

from .cache import insert, prompt_rows
from .codec import KV, Codec, Int8, Plain, codec_for
from .layout import CACHE_SPEC, PREFIX_SPEC, CacheLayout
from .new_tokens import flush, rows

__all__ = [
    "CACHE_SPEC",
    "KV",
    "PREFIX_SPEC",
    "CacheLayout",
    "Codec",
    "Int8",
    "Plain",
    "codec_for",
    "flush",
    "insert",
    "prompt_rows",
    "rows",
]
