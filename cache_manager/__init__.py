"""The stacked KV cache in pages: its layout, who has which page, and the two places where it changes, insert and
flush."""

from .codec import KV, Codec, Int8, Plain, codec_for
from .flush import flush, rows
from .insert import insert, prompt_rows
from .layout import CACHE_SPEC, PREFIX_SPEC, CacheLayout, tuned_page_rows

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
    "tuned_page_rows",
]
