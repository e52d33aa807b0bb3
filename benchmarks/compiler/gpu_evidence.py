"""The tables of docs/gpu-evidence.md, as XLA's GPU compiler tells them today; no GPU needed.

Run as `python -m slipstream.benchmarks.compiler.gpu_evidence`, about ten minutes on two cores; or with the names of
the tables that are wanted: serving, loops, attention. The compiler alone is enough: pip install jax-cuda12-pjrt, of
jaxlib's version.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ...cache_manager import CacheLayout
from ...engine_impl.assembly import twin
from ...engine_impl.compiler.budget import cache_copies
from ...engine_impl.compiler.hlo import Program
from ...engine_impl.compiler.lowering import lower_generate
from ...engine_impl.compiler.plan import abstract_engine, plan, shape_of
from ...engine_impl.compiler.topology import devices_of
from ...engine_impl.config import EngineConfig
from ...engine_impl.engine import Engine
from ...engine_impl.forward import LayerLoop
from ...engine_impl.weights.sharding import make_mesh
from ...kernels.ragged_attention.xla_gpu import pages_a_block
from ..baselines.attentions import AttentionVariant, attentions
from ..measure.table import print_tables

GIB, MIB = 2**30, 2**20
TOPOLOGY = "h100:1"
MODELS = ("llama-3.1-8b", "llama-2-7b")
SERVING = [  # model, GPUs, slots, cache length
    ("llama-3.1-8b", 1, 8, 4096),
    ("llama-3.1-8b", 1, 32, 4096),
    ("llama-3.1-8b", 1, 64, 4096),
    ("llama-3.1-8b", 1, 128, 2048),
    ("llama-2-7b", 1, 8, 4096),
    ("llama-2-7b", 1, 24, 4096),
    ("llama-2-7b", 1, 64, 1024),
    ("llama-3.1-70b", 8, 64, 4096),
]


def serving_rows() -> Iterator[str]:
    """What fits, what is copied, and the floor of a step."""
    yield "| model | GPUs | slots | cache | fits | GiB a GPU | temp MiB | cache-sized copies | floor ms | tokens/s |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for model, gpus, slots, cache_length in SERVING:
        config = EngineConfig(
            model=model, slots=slots, cache_length=cache_length, cache_tokens=slots * cache_length,
            max_prefill_length=256,
        )  # fmt: skip
        report = plan(config, shape_of(model), f"h100:{gpus}")
        there = f"{report.hbm_bytes_per_chip / GIB:.1f}"
        if report.misfit is not None:
            row = [f"**no** ({report.misfit.program})", f"{(report.misfit.needed_bytes or 0) / GIB:.1f} / {there}"]
            row += [""] * 4
        else:
            step = report.programs["generate"]
            copies = sum(len(program.cache_sized_copies) for program in report.programs.values())
            used = f"{report.resident_bytes_per_chip / GIB:.1f} / {there}"
            row = ["yes", used, f"{step.temp_bytes / MIB:,.0f}", str(copies)]
            row += [f"{step.floor_ms:.2f}", f"{step.tokens_per_second_ceiling:,.0f}"]
        yield _line([model, gpus, slots, cache_length, *row])


def loop_rows() -> Iterator[str]:
    """The decode step with its layers unrolled over their own arrays, and under a scan over stacked ones."""
    yield "| model, 8 x 2048 | layers | temp MiB | matrices copied a layer | kernels outside attention |"
    yield "|---|---|---|---|---|"
    loops: tuple[LayerLoop, ...] = ("unrolled", "scan")
    for model in MODELS:
        for loop in loops:
            engine = twin(_engine(model, slots=8, cache_length=2048), layer_loop=loop)
            compiled = lower_generate(engine).compile()
            hlo = Program(compiled.as_text() or "")
            outside, _ = hlo.launches()
            yield _line([model, loop, _temp(compiled), _copied_matrices(hlo, engine), outside])


def attention_rows() -> Iterator[str]:
    """One layer's decode attention over the cache of all layers, in each of its forms."""
    yield "| shape | form | temp MiB | cache-sized copies | rows a turn | kernels a turn | turns a layer of 2048 live |"
    yield "|---|---|---|---|---|---|---|"
    mesh = make_mesh(devices_of(TOPOLOGY), 32, 8, 1)
    for model in MODELS:
        for slots in (8, 32):
            engine = _engine(model, slots=slots, cache_length=2048)
            layout, heads = engine.layout, engine.model.config.num_heads
            page_bytes = layout.slots * math.prod(layout.shape[2:]) * layout.dtype.itemsize
            R, J = layout.page_rows, layout.pages_per_slot
            rows = {"slipstream (xla_gpu)": R * pages_a_block(page_bytes, R, J), "slipstream (xla)": R}
            for attention in attentions("gpu", "xla_gpu", mesh):
                if attention.name in rows:
                    compiled = _compile_attention(attention, layout, heads, mesh)
                    hlo, block = Program(compiled.as_text() or ""), rows[attention.name]
                    cells = [_temp(compiled), len(cache_copies(hlo, engine)), block, hlo.launches()[1]]
                    yield _line([f"{model}, {slots} x {layout.length}", attention.name, *cells, -(-2048 // block)])


def _compile_attention(attention: AttentionVariant, layout: CacheLayout, heads: int, mesh: jax.sharding.Mesh) -> Any:
    kv_heads, slots, lanes = layout.kv_heads, layout.slots, 2 * layout.head_dim
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(shape: tuple[int, ...], dtype: Any = layout.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    prepared = (
        abstract((slots, kv_heads, lanes)),
        abstract(layout.shape),
        abstract((slots,), jnp.int32),
        abstract((slots, layout.pages_per_slot), jnp.int32),
    )
    q_BNH = abstract((slots, heads, lanes // 2))
    return jax.jit(attention.attend, static_argnums=1).lower(q_BNH, 0, prepared).compile()


def _copied_matrices(hlo: Program, engine: Engine) -> int:
    """Weights of one layer that are copied before they are multiplied, by their shapes."""
    layers = engine.parameters.abstract()["layers"]
    is_stacked = isinstance(layers, dict)
    leaves = [leaf for leaf in jax.tree.leaves(layers) if len(leaf.shape) == (3 if is_stacked else 2)]
    of_a_layer = {leaf.shape: math.prod(leaf.shape[-2:]) * leaf.dtype.itemsize for leaf in leaves}
    return sum(len(hlo.copies_of(shape, nbytes)) for shape, nbytes in of_a_layer.items())


def _engine(model: str, slots: int, cache_length: int) -> Engine:
    config = EngineConfig(model=model, slots=slots, cache_length=cache_length, cache_tokens=slots * cache_length)
    return abstract_engine(shape_of(model), TOPOLOGY, config)


def _temp(compiled: jax.stages.Compiled) -> str:
    memory = compiled.memory_analysis()
    assert memory is not None
    return f"{memory.temp_size_in_bytes / MIB:,.1f}"


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


TABLES = {"serving": serving_rows, "loops": loop_rows, "attention": attention_rows}


if __name__ == "__main__":
    print_tables(TABLES, sys.argv[1:])
