"""Gates: the engine's own programs, compiled by the real TPU compiler, as they will run on real chips.

`make test` runs a pairwise selection, `make gates` the whole product. Two layers show what all layers do, and a cache
that is too large for VMEM (128 MiB) is treated as a real one is.
"""

import functools
import itertools
from typing import Any

import jax
import pytest
from slipstream.benchmarks.eager import EagerEngine
from slipstream.engine_impl.chips import CHIPS, chip_of
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.hlo import Program
from slipstream.engine_impl.models.llama import LlamaConfig
from slipstream.engine_impl.plan import abstract_engine

SLOTS, CACHE_LENGTH, BUCKET, LAYERS, VOCABULARY = 64, 4096, 256, 2, 32768
PROGRAMS = ("generate", "insert", "prefill")
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2")

PRODUCT = [*itertools.product(PROGRAMS, (1, 4, 8), (64, 128), (*TOPOLOGIES, "v4:2x2x1"))]

PAIRWISE = [  # every pair of program, kv heads a chip, head dim and topology; on v4 each program once
    *[
        (program, kv_heads, head_dim, TOPOLOGIES[(i + j + k) % 3])
        for i, program in enumerate(PROGRAMS)
        for j, kv_heads in enumerate((1, 4, 8))
        for k, head_dim in enumerate((64, 128))
    ],
    ("generate", 4, 128, "v4:2x2x1"),
    ("insert", 1, 64, "v4:2x2x1"),
    ("prefill", 8, 64, "v4:2x2x1"),
]
CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=pytest.mark.slow if case in PAIRWISE else pytest.mark.gates)
    for case in PRODUCT
]


@functools.cache
def small_engine(kv_heads: int, head_dim: int, topology: str) -> Engine:
    """Two layers of a Llama with so many kv heads on each of eight chips."""
    shape = LlamaConfig(
        num_layers=LAYERS, num_heads=16 * kv_heads, num_kv_heads=8 * kv_heads, head_dim=head_dim,
        model_dim=1024, ffn_dim=2048, vocab_size=VOCABULARY, context_length=8192, tied_embeddings=False,
        rope_theta=1e4, rms_norm_eps=1e-5,
    )  # fmt: skip
    config = EngineConfig(slots=SLOTS, cache_length=CACHE_LENGTH, max_prefill_length=BUCKET)
    return abstract_engine(shape, topology, config)


def compiled(engine: Engine, program: str) -> Any:
    lower = {
        "generate": engine.lower_generate,
        "insert": lambda: engine.lower_insert(BUCKET),
        "prefill": lambda: engine.lower_prefill(BUCKET),
    }
    return lower[program]().compile()


def cache_shard(engine: Engine) -> tuple[tuple[int, ...], int]:
    """(shape, bytes) of the cache on one chip."""
    shape = engine.layout.abstract(engine.mesh).sharding.shard_shape(engine.layout.shape)
    return shape, engine.layout.bytes // engine.mesh.size


@pytest.mark.parametrize(("program", "kv_heads", "head_dim", "topology"), CASES)
def test_a_program_on_real_chips(program, kv_heads, head_dim, topology):
    """It compiles and fits, the donated cache is updated in place, and nothing copies it."""
    engine = small_engine(kv_heads, head_dim, topology)
    executable = compiled(engine, program)
    memory, hlo = executable.memory_analysis(), Program(executable.as_text())
    shape, cache_bytes = cache_shard(engine)

    assert hlo.copies_of(shape, cache_bytes // LAYERS // 2) == []
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + cache_bytes < chip_of(topology).hbm_bytes
    if program == "prefill":
        assert hlo.pallas_calls() == {"splash_mha_fwd_no_residuals": LAYERS}
    else:
        logits_bytes = 4 * SLOTS * VOCABULARY // engine.mesh.size  # a sampled step holds a few of these
        assert memory.temp_size_in_bytes < 0.01 * cache_bytes + 8 * logits_bytes
        assert cache_bytes <= memory.alias_size_in_bytes < cache_bytes + 16 * 1024
        kernels = {"ragged_attention": LAYERS, "cache_flush": 1} if program == "generate" else {}
        assert hlo.pallas_calls() == kernels


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (4, 128)])
def test_what_one_program_leaves_the_next_takes_as_it_lies(kv_heads, head_dim):
    """Prefill's prefix and the state have one layout in all programs: no relayout between them."""
    engine = small_engine(kv_heads, head_dim, "v5e:2x4")
    prefill, insert, generate = (compiled(engine, program) for program in ("prefill", "insert", "generate"))
    (prefix, state_in, _), _ = insert.input_formats
    (_, state), _ = generate.input_formats
    state_out, _ = generate.output_formats
    layouts = [prefill.output_formats[0].kv.rows.layout, prefix.kv.rows.layout]
    assert layouts[0] == layouts[1]
    caches = [formats.cache.rows.layout for formats in (state_in, insert.output_formats, state, state_out)]
    assert len(set(caches)) == 1


@pytest.mark.slow
def test_no_step_sorts_the_vocabulary():
    """A sort of it takes the compiler 23 s by itself, and the chip more than the rest of the sampler."""
    generate = compiled(small_engine(1, 64, "v5e:2x4"), "generate").as_text()
    assert " sort(" not in generate


@pytest.mark.slow
def test_the_gate_sees_a_copy_where_there_is_one():
    """The eager design as one writes it first: an XLA scatter in each layer meets a Pallas call on one cache."""
    engine = small_engine(4, 128, "v5e:2x4")
    executable = EagerEngine(engine, "stacked", scatter="sliced").lower_generate().compile()
    shape, cache_bytes = cache_shard(engine)
    assert Program(executable.as_text()).copies_of(shape, cache_bytes // LAYERS // 2) != []
    assert executable.memory_analysis().temp_size_in_bytes > 0.5 * cache_bytes


@pytest.mark.slow
@pytest.mark.parametrize("generation", CHIPS)
def test_the_chips_table_says_what_the_compiler_says(generation):
    """HBM limits come from its out-of-memory message, to its two digits."""
    from slipstream.engine_impl.topology import tpu_devices

    chip = CHIPS[generation]
    mesh = jax.sharding.Mesh(tpu_devices(f"{generation}:{chip.topologies[0]}")[:1], ("x",))
    spec = jax.NamedSharding(mesh, jax.P())
    huge = jax.ShapeDtypeStruct((2**20, 2**20), "float32", sharding=spec)
    limit = f"available HBM ({chip.hbm_bytes / 2**30:.2f}G)"
    with pytest.raises(jax.errors.JaxRuntimeError) as told:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    assert limit in str(told.value)
