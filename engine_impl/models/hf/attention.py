"""Our `attend` as one of transformers' attention functions, and masks that only tell what they would let through.

transformers finds both by name. Whoever runs a layer says beforehand, for his own thread, what attention is to be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoder import Attend

NAME = "slipstream"

HARMLESS = {"is_causal", "position_ids", "return_dict", "sliding_window"}
"""Arguments of attention that change nothing which the mask does not tell. What is None or False changes nothing."""


class CannotError(Exception):
    """What a model does that could not be right here, in words that go on behind "is of a model"."""


@dataclass(frozen=True)
class Mask:
    """In a mask's place: how far back it lets a token see."""

    window: int | None
    """tokens, its own included; None is all"""

    def __getattr__(self, name: str) -> Any:
        """Who asks more of it wants a tensor."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise CannotError("whose layers have their own way with masks")

    def __getitem__(self, key: Any) -> Any:
        raise CannotError("whose layers have their own way with masks")

    __radd__ = __add__ = __getitem__


class Called(NamedTuple):
    """What attention was called with."""

    query_heads: int
    k_RKH: Tensor
    v_RKH: Tensor
    mask: Any
    soft_cap: float | None


@dataclass
class Attending:
    """What attention is for the layers that run, and with what they called it."""

    attend: Attend
    kv_heads: int | None = None
    """as the cache has them; None: as the layers do"""
    calls: list[Called] = field(default_factory=list)

    def answer(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        *,
        scale: float | None,
        soft_cap: float | None,
        sink_N: Tensor | None,
    ) -> Tensor:
        """[1, heads, R, H] each -> [1, R, N, H]"""
        if k.shape[2] != q.shape[2]:
            raise CannotError(
                f"whose attention reads {k.shape[2]} rows for {q.shape[2]}, of another text or of a cache of its own"
            )
        if k.shape[3] != v.shape[3]:
            raise CannotError(f"whose attention has keys of {k.shape[3]} dimensions and values of {v.shape[3]} (MLA)")
        q_RNH, k_RKH, v_RKH = (heads[0].transpose(0, 1) for heads in (q, k, v))
        H = q_RNH.shape[-1]
        if scale is not None and scale != H**-0.5:
            q_RNH = q_RNH * (scale * H**0.5)
        q_RNH, k_RKH = q_RNH.to(v_RKH.dtype), k_RKH.to(v_RKH.dtype)
        if self.kv_heads is not None and self.kv_heads != k_RKH.shape[1]:
            copies = self.kv_heads // k_RKH.shape[1]
            k_RKH, v_RKH = k_RKH.repeat_interleave(copies, 1), v_RKH.repeat_interleave(copies, 1)
        self.calls.append(Called(q_RNH.shape[1], k_RKH, v_RKH, mask, soft_cap))
        return self.attend(q_RNH, k_RKH, v_RKH, *(() if sink_N is None else (sink_N,)))[None]


_now: ContextVar[Attending] = ContextVar("attending")


@contextmanager
def attending(attend: Attend, kv_heads: int | None = None) -> Iterator[Attending]:
    """Within, transformers' layers attend by `attend`."""
    current = Attending(attend, kv_heads)
    token = _now.set(current)
    try:
        yield current
    finally:
        _now.reset(token)


def register() -> None:
    """Makes transformers know both functions. More than once does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    for name, argument in more.items():
        if argument is not None and argument is not False and name not in HARMLESS:
            raise CannotError(f"whose attention takes {name}")
    if more.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise CannotError("whose attention lets tokens see later ones")
    answer = _now.get().answer(query, key, value, attention_mask, scale=scaling, soft_cap=softcap, sink_N=s_aux)
    return answer, None


def _mask(*, mask_function: Callable[..., Any] | None = None, local_size: int | None = None, **more: Any) -> Mask:
    """What a mask lets through, found by asking for tokens on both sides of where it could end."""
    if mask_function is None:
        raise CannotError("with a mask that nothing tells of")
    last = local_size or 32
    places = torch.tensor(sorted({max(0, n * last + off) for n in (0, 1, 2) for off in (-1, 0, 1, 2)}))
    q, kv = (grid.flatten() for grid in torch.meshgrid(places, places, indexing="ij"))
    zero = torch.zeros((), dtype=torch.long)
    told = torch.stack([torch.as_tensor(mask_function(zero, zero, *pair)) for pair in zip(q, kv, strict=True)])
    for window in dict.fromkeys((None, local_size)):
        if torch.equal(told.bool(), (kv <= q) & (kv > q - window if window else True)):
            return Mask(window)
    raise CannotError("with a mask that is neither causal nor a sliding window")
