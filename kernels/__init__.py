"""Attention and cache kernels: arrays and a mesh in, arrays out.

They know nothing of models, requests or slots' owners. Each op is a folder: `op.py` validates at trace time, shards
over the mesh axis "tensor" and picks the backend; `reference.py` is the definition in plain XLA, and what runs where
no other file does; `pallas_tpu.py` is the TPU kernel, `native_cpu.py` calls the CPU's (native/). The axes' letters are
explained in `cache_manager/layout.py`.
"""

from .backend import AXIS, Backend, backend_for, is_xla
from .blockwise_matmul import Blockwise, Split, blockwise_matmul
from .cache_flush import cache_flush
from .chunk_attention import chunk_attention
from .expert_matmul import expert_matmul
from .panel_matmul import (
    PANEL,
    Panels,
    columns,
    pack,
    pack_blocks,
    pack_int4,
    pack_int8,
    panel_matmul,
    rounded,
    takes_blocks,
    unpack,
)
from .ragged_attention import attention_steps, page_rows, ragged_attention
from .rms_norm import rms_norm

__all__ = [
    "AXIS",
    "PANEL",
    "Backend",
    "Blockwise",
    "Panels",
    "Split",
    "attention_steps",
    "backend_for",
    "blockwise_matmul",
    "cache_flush",
    "chunk_attention",
    "columns",
    "expert_matmul",
    "is_xla",
    "pack",
    "pack_blocks",
    "pack_int4",
    "pack_int8",
    "page_rows",
    "panel_matmul",
    "ragged_attention",
    "rms_norm",
    "rounded",
    "takes_blocks",
    "unpack",
]
