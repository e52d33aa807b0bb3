"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Factors = tuple[float, ...]
"""What each of the rope's frequencies is divided by."""


class Stretched(Protocol):
    """A rope's frequencies in texts that come to more tokens than it was trained for."""

    def of_texts(self, reach_R: Tensor, frequency_F: Tensor) -> Tensor:
        """frequency_RF of rows of texts of these reaches, see `ModelConfig.reach_of`; `frequency_F` within the trained
        length."""
        ...


@dataclass(frozen=True)
class Angles:
    """One rope: how fast each pair of a head's dimensions turns."""

    frequencies: tuple[float, ...]
    """radians per token, fastest first; a head's dimensions behind twice as many do not turn"""
    scale: float = 1.0
    """cos and sin are multiplied by it"""
    stretched: Stretched | None = None
    """None: they are the same in all texts"""


class Rope(nn.Module):
    """One rope or several of the same width."""

    def __init__(self, *angles: Angles) -> None:
        super().__init__()
        self.angles = angles

    def forward(self, position_R: Tensor, reach_R: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], ...]:
        """i32 positions, and the reaches of their texts -> a (cos_R1H, sin_R1H) for each rope, float32, to be broadcast
        over heads. H is the width that turns.

        Raises ValueError without reaches where a rope depends on them.
        """
        return tuple(_turns(position_R, reach_R, angles) for angles in self.angles)


def _turns(position_R: Tensor, reach_R: Tensor | None, angles: Angles) -> tuple[Tensor, Tensor]:
    frequency = torch.tensor(angles.frequencies, device=position_R.device, dtype=torch.float32)
    if angles.stretched is not None:
        if reach_R is None:
            raise ValueError("a rope that depends on the text's length needs its reach")
        frequency = angles.stretched.of_texts(reach_R, frequency)[:, None]
    angle = position_R.float()[:, None, None] * frequency
    angle_R1H = torch.cat([angle, angle], dim=-1)
    if angles.scale == 1:
        return angle_R1H.cos(), angle_R1H.sin()
    return angle_R1H.cos() * angles.scale, angle_R1H.sin() * angles.scale


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn heads [R, heads, H] by their row's angle, in the dimensions that the rope covers; computed in float32."""
    cos_R1H, sin_R1H = rope
    width = cos_R1H.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], rope), x[..., width:]], dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos_R1H + turned * sin_R1H).to(x.dtype)


def frequencies(width: int, theta: float, factors: Factors | None = None) -> tuple[float, ...]:
    """The frequencies of a rope that turns `width` dimensions, fastest first (radians per token), each divided by its
    factor; None is no scaling."""
    plain = tuple(theta ** (-2 * i / width) for i in range(width // 2))
    return plain if factors is None else tuple(f / factor for f, factor in zip(plain, factors, strict=True))
