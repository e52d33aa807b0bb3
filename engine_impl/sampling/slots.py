"""Sampling parameters on the device."""

from collections.abc import Iterable, Mapping
from dataclasses import make_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..option import MAX_TOKEN_ID, Option, PaddedRows, options_of
from .params import SamplingParams

NOWHERE = MAX_TOKEN_ID
"""Fills rows of token ids; beyond every vocabulary."""

ON_DEVICE = tuple(option for option in options_of(SamplingParams) if option.device is not None)

Leaves: Any = make_dataclass("Leaves", [(option.name, Any) for option in ON_DEVICE], frozen=True)


class SlotSampling(Leaves):
    """A leaf for each option of SamplingParams that names its `device`; meanings and dtypes as declared there.

    A scalar is [B], rows are [B, length] each; for one request without the B. Two differ from the request's: behind
    prefill `min_tokens` counts from the beginning of the text, the prompt included, as positions do; and
    `stop_token_ids` has the model's own as well, where they end the answer.
    """

    @classmethod
    def of(cls, params: SamplingParams, model_stop_ids: Iterable[int] = ()) -> "SlotSampling":
        """One request's, on the host. `model_stop_ids`: needed for min_tokens alone."""
        values = {option.name: getattr(params, option.name) for option in ON_DEVICE}
        if not params.ignore_eos:
            values["stop_token_ids"] += tuple(model_stop_ids)
        return cls(**{option.name: leaf(option, values[option.name]) for option in ON_DEVICE})

    @classmethod
    def greedy(cls, slots: int) -> "SlotSampling":
        """For all slots."""
        return jax.tree.map(lambda value: jnp.broadcast_to(value, (slots, *value.shape)), cls.of(SamplingParams()))

    @property
    def is_drawn(self) -> jax.Array:
        """bool; random rather than the likeliest"""
        return self.temperature > 0

    @property
    def is_penalised(self) -> jax.Array:
        """bool; asks for a penalty of any kind"""
        return (self.repetition_penalty != 1) | (self.presence_penalty != 0) | (self.frequency_penalty != 0)

    @property
    def is_biased(self) -> jax.Array:
        """bool; rows are filled from the first one on"""
        token_BK, _ = self.logit_bias
        return token_BK[..., 0] != NOWHERE

    def must_go_on(self, position_B: jax.Array) -> jax.Array:
        """bool; no token at these positions may end the answer"""
        return position_B < self.min_tokens


jax.tree_util.register_dataclass(SlotSampling, [option.name for option in ON_DEVICE], [])


def leaf(option: Option, value: Any) -> Any:
    """What the device has of one request's option: a scalar, an array, or a tuple of arrays."""
    if not isinstance(option.device, PaddedRows):
        assert option.device is not None
        return np.dtype(option.device).type(option.absent if value is None else value)
    columns = (value.keys(), value.values()) if isinstance(value, Mapping) else (value,)
    arrays = [np.zeros(option.device.length, dtype) for dtype in option.device.dtypes]
    arrays[0][:] = NOWHERE
    for array, column in zip(arrays, columns, strict=True):
        array[: len(column)] = list(column)
    return arrays[0] if len(arrays) == 1 else tuple(arrays)
