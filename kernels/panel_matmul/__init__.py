"""Multiplies activations with weights that lie in panels of 32 outputs, as CPUs read them best."""

from .op import panel_matmul
from .reference import PANEL, Panels, columns, pack

__all__ = ["PANEL", "Panels", "columns", "pack", "panel_matmul"]
