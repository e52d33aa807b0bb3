"""Operations that a prompt cannot avoid, and how many a second a device does."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from ...engine_impl.models import registry
from ...engine_impl.models.decoder import ModelConfig
from ...engine_impl.weights.load import float_shapes

SIDE = {"cpu": 2048}
"""Side of the square matrices that are multiplied, by platform: large enough to keep every core busy."""
SIDE_ELSEWHERE = 8192
REPEATS = 12


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Operations (a multiplication and an addition are two) of a prompt of so many tokens, padding left out.

    2 for each weight of a matrix and each token, and 4 * head_dim for each query head and each pair of tokens of which
    one sees the other. The vocabulary's matrix counts for the last token alone; of a mixture's experts, those that a
    token goes to. The embedding is a look-up; norms, rope and softmax are not counted.
    """
    shapes = {name: shape for name, shape in float_shapes(registry.build(config)).items() if len(shape) > 1}
    head = math.prod(shapes.pop("lm_head.weight"))
    shapes.pop("embed_tokens.weight")
    chosen = getattr(config, "experts_per_token", 1) / getattr(config, "num_experts", 1)
    layers = sum(math.prod(shape) * (chosen if len(shape) == 3 else 1) for shape in shapes.values())
    pairs = sum(_pairs(tokens, window) for window in config.window_of_layer)
    return round(2 * (layers * tokens + head) + 4 * config.head_dim * config.num_heads * pairs)


def _pairs(tokens: int, window: int | None) -> int:
    """Each token sees itself and those before it, at most `window` in all."""
    seen = min(window or tokens, tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def matmul_flops(device: Any, dtype: jnp.dtype) -> float:
    """Operations a second of one device that multiplies square matrices by JAX: the best of a dozen."""
    side = SIDE.get(device.platform, SIDE_ELSEWHERE)
    with jax.default_device(device):
        x = jnp.ones((side, side), dtype)
        multiply = jax.jit(lambda a, b: a @ b)
        multiply(x, x).block_until_ready()
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            multiply(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
