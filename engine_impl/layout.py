"""The cache that a config asks for, and how long a piece of a prompt is: both in whole pages."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from ..cache_manager import CacheLayout, codec_for, tuned_page_rows
from ..kernels import backend_for
from .attention import stored_head_dim
from .config import EngineConfig, check_whole
from .models.decoder import ModelConfig

CPU_CHUNK, CHUNK = 256, 512
"""Most tokens of a piece, unless a config says; on TPUs by the compiler's estimates (docs/tpu-evidence.md)."""


def layout_of(
    config: EngineConfig, shape: ModelConfig, mesh: Mesh, dtype: jnp.dtype, page_rows: int | None = None
) -> CacheLayout:
    """The layout; `shape` has kv heads as the mesh has them. `page_rows`: of pages that another mesh has too.

    Raises RefusedError for a `cache_tokens` that are not whole pages.
    """
    slots, length, tokens = config.chosen
    rows = page_rows or page_rows_of(config, shape, mesh, dtype, length)
    check_whole("cache_tokens", tokens, rows, "a page of the cache")
    return CacheLayout(
        layers=shape.num_layers,
        slots=slots,
        page_rows=rows,
        pages=tokens // rows,
        **_of_a_page(config, shape, mesh, dtype, length),
    )


def page_rows_of(config: EngineConfig, shape: ModelConfig, mesh: Mesh, dtype: jnp.dtype, length: int) -> int:
    """R: tokens of a page, where a request has up to `length`."""
    backend = backend_for(mesh.devices.flat[0].platform)
    return tuned_page_rows(**_of_a_page(config, shape, mesh, dtype, length), mesh=mesh, backend=backend)


def chunk_of(config: EngineConfig, layout: CacheLayout, longest: int, platform: str) -> int:
    """Most tokens of a piece of a prompt, where prompts have up to `longest`.

    Raises RefusedError for a `prefill_chunk` that is not whole pages.
    """
    rows = layout.page_rows
    if config.prefill_chunk is not None:
        check_whole("prefill_chunk", config.prefill_chunk, rows, "a page of the cache")
    wanted = config.prefill_chunk or (CPU_CHUNK if platform == "cpu" else CHUNK)
    return min(layout.pages_for(wanted), layout.pages_for(longest)) * rows


def _of_a_page(config: EngineConfig, shape: ModelConfig, mesh: Mesh, dtype: jnp.dtype, length: int) -> dict[str, Any]:
    return {
        "kv_heads": shape.num_kv_heads,
        "length": length,
        "head_dim": stored_head_dim(shape.head_dim, backend_for(mesh.devices.flat[0].platform)),
        "dtype": dtype,
        "codec": codec_for(config.quantize_kv),
    }
