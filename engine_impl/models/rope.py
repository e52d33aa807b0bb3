"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fields import Fields

Factors = tuple[float, ...]
"""What each of the H/2 frequencies is divided by."""

SCALINGS = ("default", "linear", "llama3")


class Rope(nn.Module):
    """One rope or several of the same width."""

    def __init__(self, *frequencies: Sequence[float]) -> None:
        """Each rope's H/2 frequencies, see `frequencies`."""
        super().__init__()
        self.frequencies = frequencies

    def forward(self, position_R: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """i32 positions -> a (cos_R1H, sin_R1H) for each rope, float32, to be broadcast over heads."""
        return tuple(_turns(position_R, frequencies) for frequencies in self.frequencies)


def _turns(position_R: Tensor, frequencies: Sequence[float]) -> tuple[Tensor, Tensor]:
    frequency = torch.tensor(frequencies, device=position_R.device, dtype=torch.float32)
    angle = position_R.float()[:, None, None] * frequency
    angle_R1H = torch.cat([angle, angle], dim=-1)
    return angle_R1H.cos(), angle_R1H.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn heads [R, heads, H] by their row's angle; computed in float32."""
    cos_R1H, sin_R1H = rope
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos_R1H + turned * sin_R1H).to(x.dtype)


def frequencies(head_dim: int, theta: float, factors: Factors | None = None) -> list[float]:
    """The rope's H/2 frequencies, fastest first (radians a token), each divided by its factor; None is no scaling."""
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    return plain if factors is None else [f / factor for f, factor in zip(plain, factors, strict=True)]


def read_factors(fields: Fields, rope: dict[str, Any], head_dim: int) -> Factors | None:
    """How the parameters of a rope, one of SCALINGS, stretch its frequencies."""

    def parameter(name: str) -> Any:
        if rope.get(name) is None:
            raise fields.refused(f"has a rope of type {rope['rope_type']} without {name}; fetch it anew")
        return rope[name]

    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "linear":
        return (float(parameter("factor")),) * (head_dim // 2)
    return llama3_rope_factors(
        head_dim,
        rope["rope_theta"],
        factor=parameter("factor"),
        low=parameter("low_freq_factor"),
        high=parameter("high_freq_factor"),
        trained_length=parameter("original_max_position_embeddings"),
    )


def llama3_rope_factors(
    head_dim: int, theta: float, *, factor: float, low: float = 1.0, high: float = 4.0, trained_length: int = 8192
) -> Factors:
    """How Llama 3.1 and later stretch their rope (`rope_type: llama3`); defaults as in the published configs.

    A frequency that turns fewer than `low` times over the trained length (tokens) is divided by `factor`, one that
    turns more than `high` times is kept, those between are blended.
    """

    def divisor(frequency: float) -> float:
        turns = trained_length * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / (kept + (1 - kept) / factor)

    return tuple(divisor(frequency) for frequency in frequencies(head_dim, theta))
