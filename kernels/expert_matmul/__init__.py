"""Rows times the matrices of the experts that each of them chose."""

from .op import expert_matmul
from .reference import expert_matmul_reference

__all__ = ["expert_matmul", "expert_matmul_reference"]
