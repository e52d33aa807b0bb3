"""From a config to an engine with its weights: choose devices, open the checkpoint, split, load."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels import backend_for
from .assembly import assembled
from .checkpoints.contract import Checkpoint
from .checkpoints.embedded import home
from .checkpoints.open import open_checkpoint
from .compiler.chips import GPU_MEMORY_SHARE
from .config import TILE, EngineConfig
from .disaggregated import BothParams, DisaggregatedEngine
from .draft_model import check_same_tokens, draft_model
from .engine import Engine
from .errors import RefusedError
from .forward import Params
from .models import registry
from .quantization.panels import packs, told
from .quantization.swap import resolved
from .runtime import allocator, compilations, timeline
from .runtime.platforms import platform_of
from .sampling.params import MAX_MODEL_STOP_IDS
from .sizes import free_memory, longest_text, memory_of, sized, with_pages_for_all
from .weights.sharding import make_mesh

log = logging.getLogger(__name__)

COUNT_BYTES = 2
"""A slot's count of one token of the vocabulary (`DecodeState.count_BV`, u16)."""

MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""JAX's variables for how much of a GPU's memory it takes when it starts; to set both is an error."""


def load_engine(
    config: EngineConfig, devices: Sequence[Any] | None = None, *, reserves: bool = False
) -> tuple[Engine, Params]:
    """Build the engine that the config describes and load its weights, on these devices or on all of the platform's.
    See `build_engine` for `reserves`.

    Raises RefusedError for a model that is missing or damaged, a platform without devices, or sizes that the model or
    memory does not allow.
    """
    with timeline.THIS_PROCESS.loading():
        devices = devices or choose_devices(config.platform)  # refused before a download
        checkpoint, draft = open_model(config), open_draft_model(config)
        engine = build_engine(config, checkpoint, devices, reserves=reserves, draft_checkpoint=draft)
        check_memory(engine, memory_of(engine.mesh.local_devices), free_memory())  # refused before weights are read
        return engine, load_params(engine, checkpoint, draft)


def load_params(engine: Engine, checkpoint: Checkpoint, draft: Checkpoint | None = None) -> Params:
    """The weights, in memory as it suits them and the cache that comes next. Raises as `Parameters.load`."""
    allocator.use_huge_pages(beside=engine.parameters.bytes)  # else as many would have to move
    params = engine.parameters.load(checkpoint, draft)
    allocator.give_back()  # the weights as they were read
    allocator.use_huge_pages(beside=engine.programs.cache_bytes)
    return params


def load_disaggregated(config: EngineConfig, prefill_devices: int) -> tuple[DisaggregatedEngine, BothParams]:
    """`load_engine`, where the first so many of the platform's devices compute prompts and the others decode.

    Raises RefusedError likewise, and for a share that leaves one side without devices, or whose caches would differ.
    """
    with timeline.THIS_PROCESS.loading():
        devices = choose_devices(config.platform)
        check_share(prefill_devices, len(devices))
        checkpoint, draft = open_model(config), open_draft_model(config)
        shape = checkpoint.config
        of_prefill, of_decode = devices[:prefill_devices], devices[prefill_devices:]
        sizes = [
            make_mesh(side, shape.num_heads, shape.num_kv_heads, config.tensor_parallel).size
            for side in (of_prefill, of_decode)
        ]
        heads = max(shape.num_kv_heads, *sizes)
        if any(heads % size for size in sizes):
            raise RefusedError(
                f"prefill_devices={prefill_devices}: {sizes[0]} and {sizes[1]} devices do not share the model's "
                f"{shape.num_kv_heads} kv heads alike; halve the devices"
            )

        def build(side: Sequence[Any], config: EngineConfig, page_rows: int | None = None) -> Engine:
            return build_engine(config, checkpoint, side, draft_checkpoint=draft, kv_heads=heads, page_rows=page_rows)

        each = build(of_prefill, config), build(of_decode, config)
        rows = each[1].sizes.page_rows
        same = replace(
            config,
            slots=min(engine.sizes.slots for engine in each),
            cache_length=each[1].layout.length,
            cache_tokens=max(1, min(engine.sizes.cache_tokens for engine in each) // rows) * rows,
        )
        prefill, decode = build(of_prefill, same, rows), build(of_decode, same, rows)
        if [one.shape for one in prefill.programs.cache_layouts] != [
            one.shape for one in decode.programs.cache_layouts
        ]:
            raise RefusedError(f"prefill_devices={prefill_devices}: the draft model's caches differ; halve the devices")
        for engine in (prefill, decode):
            check_memory(engine, memory_of(engine.mesh.local_devices), free_memory())
        params = BothParams(load_params(prefill, checkpoint, draft), load_params(decode, checkpoint, draft))
        return DisaggregatedEngine(prefill, decode), params


def check_share(prefill_devices: int, devices: int) -> None:
    """Raises RefusedError for a share of the devices that leaves one side without any."""
    if not 0 < prefill_devices < devices:
        raise RefusedError(
            f"prefill_devices={prefill_devices}: there are {devices} devices, and both sides need one at least "
            "(on CPUs: XLA_FLAGS=--xla_force_host_platform_device_count=2)"
        )


def build_engine(
    config: EngineConfig,
    checkpoint: Checkpoint | None = None,
    devices: Sequence[Any] | None = None,
    *,
    reserves: bool = False,
    draft_checkpoint: Checkpoint | None = None,
    kv_heads: int | None = None,
    page_rows: int | None = None,
) -> Engine:
    """The engine that the config describes, with its tokenizer and without weights: `engine.parameters` reads them.

    Args:
        checkpoint: where shape and tokenizer come from; default: what `config.model` names.
        devices: default: all of the platform's.
        reserves: every slot has its longest request's pages for itself: where slots were left out, no more of them than
            the cache has pages for.
        draft_checkpoint: the draft model's likewise; default: what `config.draft_model` names.
        kv_heads, page_rows: of a cache that another engine has too; default: what suits the mesh.

    Raises RefusedError as `load_engine` does.
    """
    devices = devices or choose_devices(config.platform)
    compilations.keep_in(os.environ.get(compilations.FOLDER) or home() / "compiled")
    checkpoint = checkpoint or open_model(config)
    shape = checkpoint.config
    for name, value in {"cache_length": config.cache_length, "max_prefill_length": config.max_prefill_length}.items():
        if value is not None and value > shape.context_length:
            raise RefusedError(
                f"{name}={value} is beyond what {checkpoint.name} was trained for; use at most {shape.context_length}, "
                f"or leave --{name.replace('_', '-')} out"
            )
    mesh = make_mesh(devices, shape.num_heads, shape.num_kv_heads, config.tensor_parallel)
    model = registry.build(replace(shape, num_kv_heads=kv_heads or max(shape.num_kv_heads, mesh.size)))
    dtype = choose_dtype(config.dtype, devices[0].platform)
    if packs(mesh, backend_for(devices[0].platform)):
        dtype = jnp.dtype("float32")  # of activations and cache; weights become what the config says
    tokenizer, draft, draft_checkpoint = checkpoint.tokenizer(), None, draft_checkpoint or open_draft_model(config)
    if draft_checkpoint is not None:
        check_same_tokens(tokenizer, draft_checkpoint.tokenizer(), draft_checkpoint.name)
        length = config.cache_length or shape.context_length
        its = draft_checkpoint
        draft = draft_model(config, its.config, its.quantization, mesh, length, its.compact())
    config = resolved(config, checkpoint.quantization, model, mesh)
    memory, free = memory_of(mesh.local_devices), free_memory()
    compact = checkpoint.compact()
    asked, config = config, sized(config, model.config, mesh, dtype, memory, free, draft, compact)
    if reserves and asked.slots is None:
        config = with_pages_for_all(config)
    model = registry.build(model.config.for_length(longest_text(config, model.config)))
    if tokenizer is not None and len(tokenizer.stop_ids) > MAX_MODEL_STOP_IDS:
        raise RefusedError(
            f"{checkpoint.name} has {len(tokenizer.stop_ids)} stop tokens, more than {MAX_MODEL_STOP_IDS}; "
            "list fewer as eos_token_id in its generation_config.json"
        )
    engine = assembled(
        model, mesh, config, dtype, tokenizer, config.model, shape.num_kv_heads, draft, page_rows, compact
    )
    if matrices := told(model):
        log.info("matrices in memory: %s; all weights take %d MiB", matrices, engine.parameters.bytes >> 20)
    log.info(
        "%d slots, requests of up to %d tokens, a cache of %d tokens (%d MiB), prompts in chunks of %d",
        engine.sizes.slots,
        engine.sizes.cache_length,
        engine.sizes.cache_tokens,
        engine.programs.cache_bytes >> 20,
        engine.sizes.prefill_chunk,
    )
    return engine


def check_memory(engine: Engine, memory: int | None, free: int | None) -> None:
    """Raises RefusedError for weights, a cache or a state of so many slots that are more than there is.

    Temporaries are not counted: `slipstream plan` asks the compiler for those of accelerators.

    Args:
        memory: what JAX may use on each device (bytes); None where the devices do not tell, as CPUs.
        free: the host's free memory (bytes), of account where they do not; None: unknown.
    """
    hosts = engine.mesh.size // len(engine.mesh.local_devices)
    there = memory * engine.mesh.size if memory is not None else None if free is None else free * hosts
    if there is None:
        return
    layout, weights_bytes, cache_bytes = engine.layout, engine.parameters.bytes, engine.programs.cache_bytes
    if weights_bytes > there:
        raise RefusedError(
            f"the weights take {weights_bytes >> 20} MiB and there are {there >> 20} MiB: give --quantize-weights int8 "
            "or int4, a smaller model, or memory that other programs hold"
        )
    left = there - weights_bytes
    if cache_bytes > left:
        tokens = layout.pages * layout.page_rows
        fitting = left * tokens // cache_bytes // TILE * TILE
        raise RefusedError(
            f"cache_tokens={tokens} take {cache_bytes >> 20} MiB and there are {left >> 20} MiB beside the weights: "
            f"use at most {fitting}, or leave --cache-tokens out"
        )
    slot_bytes = COUNT_BYTES * engine.sizes.vocab_size
    if layout.slots * slot_bytes > left:
        raise RefusedError(
            f"slots={layout.slots} take {layout.slots * slot_bytes >> 20} MiB beside the cache and there are "
            f"{left >> 20} MiB: use at most {left // slot_bytes}, or leave --slots out"
        )


def open_model(config: EngineConfig) -> Checkpoint:
    """What `config.model` names. Raises RefusedError."""
    registry.use_module(config.model_module)
    return open_checkpoint(config.model)


def open_draft_model(config: EngineConfig) -> Checkpoint | None:
    """What `config.draft_model` names, if it does. Raises RefusedError."""
    return None if config.draft_model is None else open_checkpoint(config.draft_model)


def choose_devices(platform: str) -> list[Any]:
    """The devices of a platform (see `EngineConfig.platform`). Raises RefusedError when it has none.

    The platform is chosen explicitly: left alone, JAX tries them all and complains of each that is not there. Of a
    GPU's memory JAX would take 75 %; here it takes GPU_MEMORY_SHARE, if the environment names no other share. On a CPU
    freed memory is kept.
    """
    if not any(os.environ.get(name) for name in MEMORY_SHARES):
        os.environ[MEMORY_SHARES[0]] = str(GPU_MEMORY_SHARE)
    name = platform_of(platform)
    jax.config.update("jax_platforms", name)
    if name == "cpu":
        allocator.keep_freed()
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter when JAX lacks the platform's plugin altogether
        reason = str(error) or "its JAX plugin is not installed"
        raise RefusedError(f"platform={platform!r} has no devices here ({reason}); use --platform cpu") from error


def choose_dtype(name: str, platform: str) -> jnp.dtype:
    """The type of weights, activations and cache (see `EngineConfig.dtype`)."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)
