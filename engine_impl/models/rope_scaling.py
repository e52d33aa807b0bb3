"""How a rope is stretched beyond the length it was trained on: one function for each `rope_type` of a config.json.

Formulas and defaults as in transformers' modeling_rope_utils.py, which the tests compare with.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fields import Fields
from .rope import Factors, frequencies


@dataclass(frozen=True)
class LongLists:
    """LongRoPE's second list of factors (Ding et al., arXiv 2402.13753)."""

    trained_length: int
    """tokens"""
    plain: tuple[float, ...]
    """the rope's frequencies without scaling (radians per token)"""
    long: Factors

    def reach_of(self, length: int) -> int:
        """See `ModelConfig.reach_of`."""
        return self.trained_length + 1 if length > self.trained_length else 0

    def of_texts(self, reach_R: Tensor, frequency_F: Tensor) -> Tensor:
        """As `Stretched`."""
        slow = [plain / factor for plain, factor in zip(self.plain, self.long, strict=True)]
        slow_F = torch.tensor(slow, device=reach_R.device, dtype=torch.float32)
        return torch.where(reach_R[:, None] > self.trained_length, slow_F, frequency_F)


@dataclass(frozen=True)
class DynamicNTK:
    """A rope whose theta grows with the length that it has to reach."""

    trained_length: int
    """tokens"""
    factor: float
    width: int
    """dimensions of a head that turn"""

    def reach_of(self, length: int) -> int:
        """See `ModelConfig.reach_of`."""
        return length if length > self.trained_length else 0

    def of_texts(self, reach_R: Tensor, frequency_F: Tensor) -> Tensor:
        """As `Stretched`."""
        length_R = torch.clamp(reach_R, min=self.trained_length).float()
        stretch_R = self.factor * length_R / self.trained_length - (self.factor - 1)
        powers = [2 * i / (self.width - 2) for i in range(self.width // 2)]
        power_F = torch.tensor(powers, device=reach_R.device, dtype=torch.float32)
        return frequency_F / stretch_R[:, None] ** power_F


Beyond = LongLists | DynamicNTK


@dataclass(frozen=True)
class Scaling:
    """What a scaling does to a rope."""

    factors: Factors | None = None
    """What each frequency is divided by; None is no scaling."""
    scale: float = 1.0
    """cos and sin are multiplied by it."""
    beyond: Beyond | None = None
    """What becomes of the rope in texts that come to more than the trained length."""


class RopeFields:
    """The parameters of one rope, the config around them, and the width that turns."""

    def __init__(self, fields: Fields, rope: Mapping[str, Any], width: int) -> None:
        self.fields, self._rope, self.width = fields, rope, width
        if unknown := sorted(set(rope) - READ - UNREAD):
            raise fields.refused(
                f"has a rope with {', '.join(unknown)}, which is not read; does it do nothing, take it out"
            )

    def __getitem__(self, name: str) -> Any:
        """Raises RefusedError when the parameter is missing or null."""
        value = self._rope.get(name)
        if value is None:
            raise self.fields.refused(f"has a rope of type {self._rope['rope_type']} without {name}; fetch it anew")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The parameter's value; the default when it is missing or null."""
        value = self._rope.get(name)
        return default if value is None else value

    def factor_list(self, name: str) -> Factors:
        """Raises RefusedError unless there is a factor for each frequency."""
        factors = tuple(map(float, self[name]))
        if len(factors) != self.width // 2:
            raise self.fields.refused(f"has a {name} of {len(factors)} numbers; its rope needs {self.width // 2}")
        return factors


READ = {
    "rope_type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor",
}  # fmt: skip
"""Parameters that some scaling reads."""

UNREAD = {"type", "finetuned"}
"""The older name of `rope_type`, and a note of YaRN's authors."""


def _default(rope: RopeFields) -> Scaling:
    return Scaling()


def _linear(rope: RopeFields) -> Scaling:
    return Scaling((float(rope["factor"]),) * (rope.width // 2))


def _dynamic(rope: RopeFields) -> Scaling:
    trained = rope.fields["max_position_embeddings"]
    return Scaling(beyond=DynamicNTK(trained, float(rope["factor"]), rope.width))


def _llama3(rope: RopeFields) -> Scaling:
    factors = llama3_rope_factors(
        rope.width,
        rope["rope_theta"],
        factor=rope["factor"],
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
        trained_length=_trained_length(rope.fields, rope, told=True),
    )
    return Scaling(factors)


def _yarn(rope: RopeFields) -> Scaling:
    longest, trained = rope.fields["max_position_embeddings"], _trained_length(rope.fields, rope)
    factor = float(rope.get("factor", longest / trained))
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    factors = yarn_factors(
        rope.width,
        rope["rope_theta"],
        factor=factor,
        trained_length=trained,
        turns=turns,
        truncate=rope.get("truncate", True),
    )
    return Scaling(factors, _yarn_scale(rope, factor))


def _yarn_scale(rope: RopeFields, factor: float) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    if (told := rope.get("attention_factor")) is not None:
        return float(told)
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return magnitude(above) / magnitude(below) if above and below else magnitude(1)


def _longrope(rope: RopeFields) -> Scaling:
    longest, trained = rope.fields["max_position_embeddings"], _trained_length(rope.fields, rope, told=True)
    factor = rope.get("factor", longest / trained)
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    plain = frequencies(rope.width, rope["rope_theta"])
    beyond = LongLists(trained, plain, rope.factor_list("long_factor"))
    return Scaling(rope.factor_list("short_factor"), float(scale), beyond)


def _trained_length(fields: Fields, rope: RopeFields, told: bool = False) -> int:
    """What stands beside the rope goes before what stands in it; `told`: it has to stand in one of the two."""
    beside = fields.get("original_max_position_embeddings")
    if beside is not None:
        return beside
    return (
        rope["original_max_position_embeddings"]
        if told
        else rope.get("original_max_position_embeddings", fields["max_position_embeddings"])
    )


SCALINGS: dict[str, Callable[[RopeFields], Scaling]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""By `rope_type`. docs/models.md tells of each."""

FIXED = ("default", "linear", "llama3", "yarn")
"""Those whose angles do not depend on how long a request may become."""


def read_scaling(fields: Fields, rope: Mapping[str, Any], width: int) -> Scaling:
    """The scaling of a rope whose type is one of SCALINGS. Raises RefusedError for parameters that are missing, of the
    wrong length, or not read."""
    return SCALINGS[rope["rope_type"]](RopeFields(fields, rope, width))


def context_length(fields: Fields) -> int:
    """`max_position_embeddings`, or how far a YaRN or dynamic rope carries beyond it (tokens)."""
    longest = fields["max_position_embeddings"]
    rope = fields.rope_given("full_attention")
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1
    if kind == "dynamic":
        return int(factor * longest)
    if kind == "yarn":
        trained = fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        return max(longest, int(factor * (trained or longest)))
    return longest


def yarn_factors(
    width: int,
    theta: float,
    *,
    factor: float,
    trained_length: int,
    turns: tuple[float, float] = (32, 1),
    truncate: bool = True,
) -> Factors:
    """YaRN (Peng et al., arXiv 2309.00071): fast frequencies are kept, slow ones divided, those between blended.

    Args:
        turns: how often a frequency turns over the trained length (tokens) that is kept, and one that is divided.
        truncate: the borders are moved to whole pairs.
    """

    def pair_that_turns(times: float) -> float:
        return width * math.log(trained_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = map(pair_that_turns, turns)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = (last - first) or 0.001

    def divisor(pair: int) -> float:
        divided = min(max((pair - first) / span, 0.0), 1.0)
        return 1 / (divided / factor + 1 - divided)

    return tuple(map(divisor, range(width // 2)))


def llama3_rope_factors(
    width: int, theta: float, *, factor: float, low: float = 1.0, high: float = 4.0, trained_length: int = 8192
) -> Factors:
    """How Llama 3.1 and later stretch their rope (`rope_type: llama3`); defaults as in the published configs.

    A frequency that turns fewer than `low` times over the trained length (tokens) is divided by `factor`, one that
    turns more than `high` times is kept, those between are blended.
    """

    def divisor(frequency: float) -> float:
        turns = trained_length * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / (kept + (1 - kept) / factor)

    return tuple(divisor(frequency) for frequency in frequencies(width, theta))
