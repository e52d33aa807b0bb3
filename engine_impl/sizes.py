"""How many slots, how long a request and how large a cache, where nobody said: what the model was trained for, and what
memory holds.

All is arithmetic on abstract shapes and takes milliseconds. `slipstream plan` asks the compiler instead, which is exact
and takes minutes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..cache_manager import CacheLayout, codec_for
from ..kernels import backend_for, is_xla
from .adapters.sites import sites_of
from .adapters.stacks import AdapterPlaces
from .attention import stored_head_dim
from .checkpoints.contract import Compact
from .config import TILE, EngineConfig
from .draft_model import DraftModel
from .forward import layer_loop_for
from .layout import CHUNK, page_rows_of
from .models import registry
from .models.decoder import ModelConfig
from .models.parts import ExpertLinear, Linear
from .quantization.swap import NOTHING_COMPACT, quantize
from .shapes import WIDE_ROWS
from .weights import load as weights

SLOTS = 8
"""Where memory is not asked, as on CPUs."""
MOST_SLOTS = 256
LENGTH = 1024
"""The longest request where memory is not asked (tokens)."""
FREE_SHARE = 0.25
"""The most that the cache takes of a host's free memory, on CPUs."""

SPARE = 0.05
"""Share of the memory for code, collectives and what does not fit without gaps."""
STEP_SHARE = 0.25
"""The most that a step's slots take of what the weights leave."""
STREAM_COPIES = 6
"""Rows of the model's width that a prefill holds at once, residual stream and norms in float32 included."""
LAYER_COPIES = 2
"""Of what a layer's matrices put out."""
SCORE_COPIES, SCORE_CHUNK = 3, 256
"""float32 scores, and the queries that XLA's chunk attention computes them for at a time."""
LOGITS_BYTES = 26
"""A slot's part of a step, for each token of the vocabulary: a u16 count before and behind, bf16 logits, and five
float32 rows while a slot asks for cuts and noise."""


def sized(
    config: EngineConfig,
    shape: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    memory: int | None,
    free: int | None = None,
    draft: DraftModel | None = None,
    compact: Mapping[str, Compact] = NOTHING_COMPACT,
) -> EngineConfig:
    """The config with slots, cache length and cache tokens filled in where they were left out.

    The cache length is what the model was trained for, in whole tiles of rows: it costs nothing by itself. Slots are
    MOST_SLOTS, or as many as a step has memory for; the cache has what weights and programs then leave. Where memory is
    not asked: SLOTS, at most LENGTH, and a cache that all slots can fill, of at most FREE_SHARE of the host's free
    memory and of what the weights leave of it. The cache has a tile at least, and whoever allocates it is told.

    Args:
        shape: kv heads as the mesh has them.
        memory: what a program may use on each device (bytes); None: not asked, as on CPUs.
        free: the host's free memory (bytes), of account on CPUs; None: unknown.
        draft: a model that is there beside, with a cache of its own in the same pages.
        compact: see `Checkpoint.compact`.
    """
    context = shape.context_length
    length = config.cache_length or tiles(context if memory is not None else min(LENGTH, context))
    config = replace(config, cache_length=length)
    if config.slots is not None and config.cache_tokens is not None:
        return config
    demand = Demand(config, shape, mesh, dtype, draft, compact)
    if memory is None:
        slots = config.slots or SLOTS
        tokens = slots * length
        if free is not None:  # the devices share it
            left = int(free * (1 - SPARE)) - demand.weights_bytes * mesh.size
            tokens = min(tokens, min(int(free * FREE_SHARE), left) // (demand.row_bytes * mesh.size))
    else:
        left = int(memory * (1 - SPARE)) - demand.weights_bytes - demand.wide_bytes
        slots = config.slots or min(max(1, int(left * STEP_SHARE) // demand.slot_bytes), MOST_SLOTS)
        chunk = min(config.prefill_chunk or CHUNK, length)
        tokens = (left - demand.prefill_bytes(chunk) - slots * demand.slot_bytes) // demand.row_bytes
    rows = max(TILE, page_rows_of(config, shape, mesh, dtype, length))  # whole tiles, as whoever gives it must
    tokens = config.cache_tokens or max(1, tokens // rows) * rows
    return replace(config, slots=slots, cache_tokens=tokens)


def with_pages_for_all(config: EngineConfig) -> EngineConfig:
    """A config with no more slots than the cache has tokens for, each with its longest request's; at least one."""
    slots, length, tokens = config.chosen
    return replace(config, slots=min(slots, max(1, tokens // length)))


class Demand:
    """What a model asks of each device (bytes)."""

    def __init__(
        self,
        config: EngineConfig,
        shape: ModelConfig,
        mesh: Mesh,
        dtype: jnp.dtype,
        draft: DraftModel | None = None,
        compact: Mapping[str, Compact] = NOTHING_COMPACT,
    ) -> None:
        platform = mesh.devices.flat[0].platform
        backend = backend_for(platform)
        model = registry.build(shape)
        layer = list(model.layers[0].modules())
        chosen = getattr(shape, "experts_per_token", 1)
        outputs = sum(module.out_features for module in layer if isinstance(module, Linear))
        outputs += sum(chosen * module.weight.shape[-1] for module in layer if isinstance(module, ExpertLinear))
        width = next(parameter.shape[1] for parameter in model.embed_tokens.parameters())
        sites = sites_of(model, mesh) if config.max_adapters else ()
        quantize(model, config, dtype, mesh, backend, compact)
        loop = layer_loop_for(platform, model)
        places = AdapterPlaces(sites, shape.num_layers, config.max_adapters, config.max_adapter_rank, mesh, dtype)
        tile = CacheLayout(
            layers=shape.num_layers, slots=1, pages=1, kv_heads=shape.num_kv_heads, length=TILE, page_rows=TILE,
            head_dim=stored_head_dim(shape.head_dim, backend), dtype=dtype, codec=codec_for(config.quantize_kv),
        )  # fmt: skip
        self.is_xla = is_xla(backend)
        params = weights.abstract_params(model, mesh, dtype, loop)
        self.weights_bytes = device_bytes(jax.tree.leaves((params, places.abstract(loop))))
        self.row_bytes = tile.bytes // TILE // mesh.size
        """A token in the cache of all layers."""
        self._token_bytes = (STREAM_COPIES * width + LAYER_COPIES * outputs // mesh.size) * dtype.itemsize
        self._score_bytes = SCORE_COPIES * SCORE_CHUNK * 4 * shape.num_heads // mesh.size
        self._vocab_bytes = LOGITS_BYTES * shape.vocab_size // mesh.size
        speculates = config.speculate != "off"
        self._text_bytes = 4 * (config.cache_length or shape.context_length) if speculates else 0
        self.wide_bytes = WIDE_ROWS * self._vocab_bytes if speculates else 0
        """Logits of the widest step."""
        if draft is not None:
            alone = replace(draft.config, speculate="off", draft_model=None)
            small = Demand(alone, draft.model.config, mesh, dtype, compact=draft.compact)
            self.weights_bytes += small.weights_bytes
            self.row_bytes += small.row_bytes

    def prefill_bytes(self, chunk: int) -> int:
        """A prefill's temporaries, its rows and those of the one before it."""
        scores = self._score_bytes if self.is_xla else 0
        return chunk * (self._token_bytes + scores + 2 * self.row_bytes)

    @property
    def slot_bytes(self) -> int:
        """A slot's part of the state, its text included where something drafts, and of a step."""
        return self._vocab_bytes + self._text_bytes


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


def free_memory() -> int | None:
    """What the host's programs may take without anything being swapped out (bytes); None where it does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            told = dict(line.split(":") for line in lines)
        return int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def longest_text(config: EngineConfig, shape: ModelConfig) -> int:
    """Prompt and answer of one request together (tokens): the cache's rows, at most the model's positions."""
    return min(config.chosen[1], shape.context_length)


def tiles(length: int) -> int:
    """Rounded up to the cache's whole tiles of rows."""
    return -(-length // TILE) * TILE
