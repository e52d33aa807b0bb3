"""How many slots of which length, where nobody said: what the model was trained for, at most what memory holds.

All is arithmetic on abstract shapes and takes milliseconds. `slipstream plan --max-slots` asks the compiler instead,
which is exact and takes minutes.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..cache_manager import CacheLayout, codec_for
from ..kernels import backend_for, is_xla
from .attention import stored_head_dim
from .config import SMALLEST_BUCKET, TILE, EngineConfig
from .errors import RefusedError
from .forward import layer_loop_for
from .models import registry
from .models.decoder import ModelConfig
from .models.parts import ExpertLinear, Linear
from .quantization.swap import quantize
from .weights import load as weights

SLOTS = 8
"""Where memory is not asked, and what a length that memory bounds leaves room for (slots)."""
MOST_SLOTS = 256
LENGTH = 1024
"""The longest cache where memory is not asked (tokens)."""
LONGEST_XLA_PROMPT = 8192
"""XLA's prefill attention is unrolled over chunks of queries: beyond it a program takes minutes to compile (tokens)."""
ROUND = 1024
"""Longer caches are multiples of the largest block that decode attention reads (tokens)."""

SPARE = 0.05
"""Share of the memory for code, collectives and what does not fit without gaps."""
PROMPT_SHARE = 0.25
"""The most that the longest prompt's prefill takes of what the weights leave."""
STREAM_COPIES = 6
"""Rows of the model's width that a prefill holds at once, residual stream and norms in float32 included."""
LAYER_COPIES = 2
"""Of what a layer's matrices put out."""
SCORE_COPIES, SCORE_CHUNK = 3, 256
"""float32 scores, and the queries that XLA's prefill attention computes them for at a time."""
LOGITS_BYTES = 26
"""A slot's part of a step, for each token of the vocabulary: a u16 count before and behind, bf16 logits, and five
float32 rows while a slot asks for cuts and noise."""


def sized(config: EngineConfig, shape: ModelConfig, mesh: Mesh, dtype: jnp.dtype, memory: int | None) -> EngineConfig:
    """The config with slots, cache length and longest prompt filled in where they were left out.

    The cache length is what the model was trained for (its rows are rounded up to whole tiles), at most what memory
    holds for the slots asked for, or for SLOTS. Slots are as many as then fit, at most MOST_SLOTS. Where memory is not
    asked: SLOTS, and at most LENGTH. Where nothing fits: one slot of that length, and whoever allocates it is told.

    Args:
        shape: kv heads as the mesh has them.
        memory: what a program may use on each device (bytes); None: not asked, as on CPUs.

    Raises RefusedError for a model with fewer positions than the shortest prompt's bucket.
    """
    context = shape.context_length
    if context < SMALLEST_BUCKET:
        raise RefusedError(
            f"the model was trained for {context} positions, and the shortest prompt that is compiled has "
            f"{SMALLEST_BUCKET}; use a model with at least as many"
        )
    if config.slots is not None and config.cache_length is not None:
        return config
    if memory is None:
        return _filled(config, SLOTS, min(LENGTH, context), context)
    demand = Demand(config, shape, mesh, dtype)
    left = int(memory * (1 - SPARE)) - demand.weights_bytes
    prompt = _prompt(config, demand, context, left)
    room = left - demand.prefill_bytes(prompt)
    fitting = _rounded(room // (config.slots or SLOTS) // demand.row_bytes)
    length = config.cache_length or min(context, fitting if fitting >= TILE else LENGTH)
    slots = room // demand.slot_bytes(tiles(length))
    return _filled(config, min(max(1, slots), MOST_SLOTS), length, min(context, prompt))


def _filled(config: EngineConfig, slots: int, length: int, longest_prompt: int) -> EngineConfig:
    prompt = config.max_prefill_length
    if prompt is None and config.cache_length is None:
        prompt = power_of_two(min(length, longest_prompt))
    return replace(
        config,
        slots=config.slots or slots,
        cache_length=config.cache_length or tiles(length),
        max_prefill_length=prompt,
    )


def _prompt(config: EngineConfig, demand: "Demand", context: int, left: int) -> int:
    """The bucket to leave room for."""
    if config.max_prefill_length is not None or config.cache_length is not None:
        return config.largest_bucket
    bucket = power_of_two(min(context, LONGEST_XLA_PROMPT) if demand.is_xla else context)
    while bucket > SMALLEST_BUCKET and demand.prefill_bytes(bucket) > left * PROMPT_SHARE:
        bucket //= 2
    return bucket


class Demand:
    """What a model asks of each device (bytes)."""

    def __init__(self, config: EngineConfig, shape: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> None:
        platform = mesh.devices.flat[0].platform
        backend = backend_for(platform)
        model = registry.build(shape)
        layer = list(model.layers[0].modules())
        chosen = getattr(shape, "experts_per_token", 1)
        outputs = sum(module.out_features for module in layer if isinstance(module, Linear))
        outputs += sum(chosen * module.weight.shape[-1] for module in layer if isinstance(module, ExpertLinear))
        width = next(parameter.shape[1] for parameter in model.embed_tokens.parameters())
        quantize(model, config, dtype, mesh, backend)
        tile = CacheLayout(
            layers=shape.num_layers, slots=1, kv_heads=shape.num_kv_heads, length=TILE, page_rows=TILE,
            head_dim=stored_head_dim(shape.head_dim, backend), dtype=dtype, codec=codec_for(config.quantize_kv),
        )  # fmt: skip
        self.is_xla = is_xla(backend)
        self.weights_bytes = device_bytes(
            jax.tree.leaves(weights.abstract_params(model, mesh, dtype, layer_loop_for(platform)))
        )
        self.row_bytes = tile.bytes // TILE // mesh.size
        """A token in the cache of all layers."""
        self._token_bytes = (STREAM_COPIES * width + LAYER_COPIES * outputs // mesh.size) * dtype.itemsize
        self._score_bytes = SCORE_COPIES * SCORE_CHUNK * 4 * shape.num_heads // mesh.size
        self._vocab_bytes = LOGITS_BYTES * shape.vocab_size // mesh.size

    def prefill_bytes(self, bucket: int) -> int:
        """A prefill's temporaries, its prefix and the one before it."""
        scores = self._score_bytes if self.is_xla else 0
        return bucket * (self._token_bytes + scores + 2 * self.row_bytes)

    def slot_bytes(self, length: int) -> int:
        """A slot of so many rows, and its part of a step."""
        return length * self.row_bytes + self._vocab_bytes


def device_bytes(arrays: Iterable[Any]) -> int:
    """What abstract arrays with a sharding take on one device (bytes). An array that occurs twice, as a tied lm_head
    does, counts once."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * jnp.dtype(array.dtype).itemsize
        for array in {id(array): array for array in arrays}.values()
    )


def memory_of(devices: Iterable[Any]) -> int | None:
    """What JAX may use on the device that has least (bytes); None where they do not tell, as CPUs."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit), default=None) if all(limits) else None


def longest_text(config: EngineConfig, shape: ModelConfig) -> int:
    """Prompt and answer of one request together (tokens): the cache's rows, at most the model's positions."""
    _, rows = config.chosen
    return min(rows, shape.context_length)


def tiles(length: int) -> int:
    """Rounded up to the cache's whole tiles of rows."""
    return -(-length // TILE) * TILE


def power_of_two(length: int) -> int:
    """The largest within it."""
    return 1 << (length.bit_length() - 1)


def _rounded(length: int) -> int:
    """Down."""
    return length // ROUND * ROUND if length >= ROUND else length // TILE * TILE
