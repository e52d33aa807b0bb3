"""Sampling parameters on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .params import SamplingParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotSampling:
    """[B], or scalars for one request; meanings as in SamplingParams."""

    temperature: jax.Array
    """f32; 0 is greedy"""
    top_k: jax.Array
    """i32; 0 keeps all"""
    top_p: jax.Array
    """f32; 1 keeps all"""
    min_p: jax.Array
    """f32; 0 keeps all"""
    seed: jax.Array
    """u32"""
    repetition_penalty: jax.Array
    """f32; 1 is none"""
    presence_penalty: jax.Array
    """f32; 0 is none"""
    frequency_penalty: jax.Array
    """f32; 0 is none"""
    logprobs: jax.Array
    """i32; -1 is none, 0 the chosen token's, k the k likeliest tokens' too"""

    @classmethod
    def of(cls, params: SamplingParams) -> "SlotSampling":
        """One request's, as scalars on the host."""
        scalars = (
            np.float32(params.temperature),
            np.int32(params.top_k),
            np.float32(params.top_p),
            np.float32(params.min_p),
            np.uint32(params.seed),
            np.float32(params.repetition_penalty),
            np.float32(params.presence_penalty),
            np.float32(params.frequency_penalty),
            np.int32(-1 if params.logprobs is None else params.logprobs),
        )
        return cls(*scalars)  # pyright: ignore[reportArgumentType]: what goes into a program may come from the host

    @classmethod
    def greedy(cls, slots: int) -> "SlotSampling":
        """For all slots."""
        return jax.tree.map(lambda value: jnp.full((slots,), value), cls.of(SamplingParams()))

    @property
    def is_drawn(self) -> jax.Array:
        """bool; random rather than the likeliest"""
        return self.temperature > 0

    @property
    def is_penalised(self) -> jax.Array:
        """bool; asks for a penalty of any kind"""
        return (self.repetition_penalty != 1) | (self.presence_penalty != 0) | (self.frequency_penalty != 0)
