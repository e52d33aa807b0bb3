"""Kernels compiled for a chip with libtpu, and what their final programs are: bundles by kind of grid step."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ...engine_impl.compiler.chips import CHIPS
from ...kernels.cache_flush.pallas_tpu import LANES, tile_rows
from .cores import CORES
from .kernel_rows import FLUSH_LAYERS, AttentionRow, ChunkRow, FlushRow, Row, ScatterRow, Setting, row_bytes
from .llo import LloProgram, parse, programs

QUERY_GROUP = 4
"""Query heads a kv head (count); up to 8 share a tile of 8 rows."""
LONGEST = 2048
"""Tokens that a slot's pages hold in a step's kernel; the schedule does not depend on it."""


def measure(chip: str, wanted: list[Setting]) -> list[Row]:
    """Compile and read kernels for a chip, in a process of its own: libtpu reads its flags when it is loaded.

    Raises RuntimeError with what the process wrote if it fails.
    """
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
        child = subprocess.run(
            [sys.executable, "-m", "slipstream.benchmarks.compiler.kernel_schedules", chip, dump],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags},
            input=json.dumps([asdict(setting) for setting in wanted]),
            capture_output=True,
            text=True,
        )
    if child.returncode:
        raise RuntimeError(f"compiling for {chip} failed:\n{child.stderr[-4000:]}")
    rows: list[Row] = []
    for line in child.stdout.splitlines():
        fields = json.loads(line)
        fields["setting"] = setting = Setting(**fields["setting"])
        kind = {"attention": AttentionRow, "chunk": ChunkRow, "scatter": ScatterRow}.get(setting.kernel, FlushRow)
        rows.append(kind(**fields))
    return rows


def read(chip: str, setting: Setting, text: str) -> Row:
    """A setting's row from its final program."""
    core = CORES[chip]
    nbytes = row_bytes(setting.kv_heads, setting.head_dim, setting.dtype)
    if setting.kernel == "scatter":
        program = parse(text, core.delay_slots, loop_of="dma.hbm_to_vmem")
        rows = program.count("dma.vmem_to_hbm")
        dma = core.dma_cycles(chip, 2 * rows * tile_rows(setting.dtype) * nbytes // setting.kv_heads)
        return ScatterRow(chip, setting, rows, program.issued([]), dma)
    program = parse(text, core.delay_slots)
    if setting.kernel == "chunk":
        return _read_chunk(chip, setting, program)
    if setting.kernel != "attention":
        tile_bytes = setting.kv_heads * 2 * LANES * 4
        if setting.kernel == "flush":  # rows alone: their scales have a flush of their own
            row_values = setting.kv_heads * 2 * setting.head_dim
            tile_bytes = tile_rows(setting.dtype) * row_values * {"bfloat16": 2, "float32": 4, "int8": 1}[setting.dtype]
        dma = core.dma_cycles(chip, 2 * FLUSH_LAYERS * tile_bytes)
        return FlushRow(chip, setting, program.issued(program.regions), dma)
    products = program.of("vmat")
    if len(products) != 2 + (setting.tokens > 1):
        raise ValueError(f"{len(products)} regions with matrix products, not own tokens', a whole page's, a boundary's")
    stages, products = program.stages(), products[-2:]  # one token's products with itself are no matrix products
    return AttentionRow(
        chip,
        setting,
        page_bytes=setting.page * nbytes,
        pipeline=program.issued(stages),
        whole=program.issued(stages | {products[0]}),
        boundary=program.issued(stages | {products[1]}),
        slot=program.issued(program.regions) - program.issued(stages | set(products)),
        dma_cycles=core.dma_cycles(chip, setting.page * nbytes),
    )


def _read_chunk(chip: str, setting: Setting, program: LloProgram) -> ChunkRow:
    from ...kernels.chunk_attention.pallas_tpu import block_and_heads

    core, stages = CORES[chip], program.stages()
    products = program.of("vmat")
    if len(products) != 3:
        raise ValueError(f"{len(products)} regions with matrix products, not the diagonal's, a block's and a page's")
    block, heads = block_and_heads(setting.tokens, setting.kv_heads, QUERY_GROUP)
    page_bytes = setting.page * row_bytes(heads, setting.head_dim, setting.dtype)
    flops = 4 * block * QUERY_GROUP * heads * setting.page * setting.head_dim
    diagonal, own, cached = (program.issued(stages | {region}) for region in products)
    return ChunkRow(
        *(chip, setting, heads, block, program.issued(stages), diagonal, own, cached),
        dma_cycles=core.dma_cycles(chip, page_bytes),
        mxu_cycles=round(flops / (CHIPS[chip].bf16_flops / core.per_device) * core.clock),
    )


def _child(chip: str, dump: Path) -> None:
    """Settings on stdin, a row each on stdout; libtpu dumps into `dump`."""
    for setting in [Setting(**fields) for fields in json.load(sys.stdin)]:
        _compile(CORES[chip].topology, setting)
        names = {"attention": "ragged_attention", "chunk": "chunk_attention", "scatter": "scatter_fusion"}
        kernel = names.get(setting.kernel, "cache_flush")
        (text,) = (text for name, text in programs(dump).items() if name.startswith(kernel))
        for path in dump.iterdir():
            path.unlink()
        print(json.dumps(asdict(read(chip, setting, text))), flush=True)


def _compile(topology: str, setting: Setting) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from ...engine_impl.compiler.topology import devices_of
    from ...kernels.cache_flush.pallas_tpu import cache_flush_tpu
    from ...kernels.chunk_attention.pallas_tpu import chunk_attention_tpu
    from ...kernels.ragged_attention.pallas_tpu import ragged_attention_tpu
    from ...kernels.ragged_attention.steps import live_steps
    from ..baselines.eager import scatter_rows

    mesh = Mesh(np.array(devices_of(topology)[:1]), ("tensor",))
    everywhere = PartitionSpec()
    K, H, B, W, rows = setting.kv_heads, setting.head_dim, 96, setting.tokens, jnp.dtype(setting.dtype)
    model = jnp.bfloat16 if setting.dtype == "int8" else rows

    def array(*shape: int, dtype: Any = rows) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, everywhere))

    def attend(q_BWNH, new_BWKC, cache_LPKRC, scale_LPK2R, layer, length_B, page_BJ, window):
        pool, rows = cache_LPKRC.shape[1], cache_LPKRC.shape[3]
        steps = live_steps(length_B, window, page_BJ, rows=rows, max_pages=pool)
        args = (q_BWNH, new_BWKC, cache_LPKRC, scale_LPK2R, layer, length_B, page_BJ, window, None, steps)
        return ragged_attention_tpu(*args, soft_cap=setting.soft_cap)

    layer, slot_B, page_B1 = array(dtype=jnp.int32), array(B, dtype=jnp.int32), array(B, 1, dtype=jnp.int32)
    kernel: Callable[..., jax.Array]
    if setting.kernel == "attention":
        kernel, donated = attend, ()
        J = LONGEST // setting.page
        q_BWNH, new_BWKC = array(B, W, K * QUERY_GROUP, H, dtype=model), array(B, W, K, 2 * H, dtype=model)
        cache_LPKRC = array(2, B * J, K, setting.page, 2 * H)
        scale_LPK2R = array(2, B * J, K, 2, setting.page, dtype=jnp.float32) if setting.dtype == "int8" else None
        window = layer if setting.window else None
        args = q_BWNH, new_BWKC, cache_LPKRC, scale_LPK2R, layer, slot_B, array(B, J, dtype=jnp.int32), window
    elif setting.kernel == "chunk":
        kernel, donated = partial(chunk_attention_tpu, soft_cap=setting.soft_cap), ()
        q_TNH, k_TKH = array(W, K * QUERY_GROUP, H, dtype=model), array(W, K, H, dtype=model)
        cache_LPKRC = array(2, 1024, K, setting.page, 2 * H)
        scale_LPK2R = array(2, 1024, K, 2, setting.page, dtype=jnp.float32) if setting.dtype == "int8" else None
        window, page_MJ = layer if setting.window else None, array(1, 32, dtype=jnp.int32)
        args = q_TNH, k_TKH, k_TKH, cache_LPKRC, scale_LPK2R, layer, array(1, dtype=jnp.int32), page_MJ, window, None
    elif setting.kernel == "scales":
        kernel, donated = partial(cache_flush_tpu, row_axis=4), (0,)
        args = array(FLUSH_LAYERS, B, K, 2, 256), array(FLUSH_LAYERS, B, W, K, 2), slot_B, slot_B, page_B1
    elif setting.kernel == "scatter":
        kernel, donated = scatter_rows, (0,)
        args = array(FLUSH_LAYERS, 4 * B, K, 256, 2 * H), array(B, K, 2 * H), layer, slot_B, slot_B
    else:
        kernel, donated = partial(cache_flush_tpu, row_axis=3), (0,)
        args = array(FLUSH_LAYERS, B, K, 256, 2 * H), array(FLUSH_LAYERS, B, W, K, 2 * H), slot_B, slot_B, page_B1
    sharded = jax.shard_map(kernel, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    jax.jit(sharded, donate_argnums=donated).lower(*args).compile()


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
