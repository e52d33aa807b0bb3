"""Multiplies activations with weights that lie in panels of 32 outputs, as CPUs read them best."""

from .op import panel_matmul, takes_blocks
from .reference import PANEL, Panels, columns, pack, pack_blocks, pack_int4, pack_int8, rounded, unpack

__all__ = [
    "PANEL",
    "Panels",
    "columns",
    "pack",
    "pack_blocks",
    "pack_int4",
    "pack_int8",
    "panel_matmul",
    "rounded",
    "takes_blocks",
    "unpack",
]
