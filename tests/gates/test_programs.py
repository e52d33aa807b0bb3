"""Gates: the engine's own programs, compiled by the real TPU compiler, as they will run on real chips.

`make test` runs a pairwise selection with few slots, each of which costs the compiler time (the sampler of 64 takes it
three times as long as that of 16, and a slot of eight tokens counts as eight); `make gates` the whole product with
many. The pool of pages is the same. Two layers show what all layers do. The int8 cache's scales would fit into VMEM
(128 MiB) here, which invites XLA to move them there and back.
"""

import functools
import itertools
from typing import Literal

import jax
import pytest
from slipstream.benchmarks.baselines.eager import eager_twin
from slipstream.engine_impl.compiler.budget import cache_copies
from slipstream.engine_impl.compiler.chips import CHIPS, chip_of
from slipstream.engine_impl.compiler.hlo import Instruction, Program
from slipstream.engine_impl.compiler.lowering import (
    lower_carry,
    lower_first_tokens,
    lower_generate,
    lower_insert,
    lower_prefill,
    lower_score_step,
)
from slipstream.engine_impl.compiler.plan import abstract_engine
from slipstream.engine_impl.compiler.presets import PRESETS
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.models.llama import LlamaConfig
from slipstream.engine_impl.sampling.params import MAX_LOGPROBS

from tests.tpu import Compiled, compiled_once, memory_of, text_of, unpacked_mask_bytes

FEW, FEWER, MANY, CACHE_LENGTH, BUCKET, LAYERS, VOCABULARY = 16, 4, 64, 4096, 256, 2, 32768
CACHE_TOKENS = MANY * CACHE_LENGTH
PROGRAMS = ("generate", "insert", "prefill")
SHAPES = ("generate_8", "generate_32", "insert_8x64", "prefill_8x64", "carry_256", "wide_1", "wide_4", "wide_8")
"""Further shapes of them: slots of a step, pieces of a prefill; a step of all slots that carries a piece along; and
steps of one and of several tokens a slot, of an engine that drafts."""
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2")

READ = [(1, 64), (4, 128)]
"""(kv heads, head dim) of the programs that further tests read: on v5e all programs of theirs are in the selection."""

SEVERAL_HOSTS = [("generate", 4, 128, topology, "none") for topology in ("v5e:4x4", "v6e:4x4", "v5p:2x2x4")]

PRODUCT = [
    *itertools.product((*PROGRAMS, *SHAPES), (1, 4, 8), (64, 128), (*TOPOLOGIES, "v4:2x2x1"), ("none", "int8")),
    *SEVERAL_HOSTS,
]

PAIRWISE = [  # every pair of program, kv heads a chip, head dim and topology; on v4 each program once, in int8 two
    *[(program, kv_heads, head_dim, "v5e:2x4", "none") for program in PROGRAMS for kv_heads, head_dim in READ],
    ("insert", 8, 64, "v5e:2x4", "none"),
    ("generate", 8, 64, "v6e:2x4", "none"),
    ("insert", 4, 128, "v6e:2x4", "none"),
    ("prefill", 1, 128, "v6e:2x4", "none"),
    ("generate", 4, 64, "v5p:2x2x2", "none"),
    ("insert", 1, 64, "v5p:2x2x2", "none"),
    ("prefill", 8, 128, "v5p:2x2x2", "none"),
    ("generate", 4, 128, "v4:2x2x1", "none"),
    ("insert", 1, 64, "v4:2x2x1", "none"),
    ("prefill", 8, 64, "v4:2x2x1", "none"),
    ("generate", 1, 128, "v5e:2x4", "int8"),
    ("insert", 4, 128, "v5e:2x4", "int8"),
    ("prefill", 4, 128, "v5e:2x4", "int8"),
    ("generate_8", 4, 128, "v5e:2x4", "none"),
    ("generate_8", 1, 64, "v6e:2x4", "int8"),
    ("insert_8x64", 1, 128, "v5p:2x2x2", "none"),
    ("prefill_8x64", 8, 128, "v5e:2x4", "none"),
    ("carry_256", 4, 128, "v5e:2x4", "none"),
    ("wide_1", 1, 128, "v5e:2x4", "none"),
    ("wide_4", 1, 128, "v5e:2x4", "none"),
    ("wide_4", 4, 64, "v6e:2x4", "int8"),
    ("wide_8", 4, 128, "v5p:2x2x2", "none"),
]
CASES = [
    pytest.param(*case, slots, id="-".join(map(str, (*case, slots))), marks=mark)
    for cases, few, mark in ((PAIRWISE, True, pytest.mark.slow), (PRODUCT, False, pytest.mark.gates))
    for case in cases
    for slots in [MANY if not few else FEWER if case[0].startswith("wide") and case[4] == "none" else FEW]
]  # an int8 cache's step has a megabyte beside what grows with the slots


def test_the_selection_has_every_pair():
    values = PROGRAMS, (1, 4, 8), (64, 128), TOPOLOGIES
    axes = itertools.combinations(range(len(values)), 2)
    wanted = {(i, j, *pair) for i, j in axes for pair in itertools.product(values[i], values[j])}
    chosen = [case for case in PAIRWISE if case[4] == "none"]
    assert wanted <= {(i, j, case[i], case[j]) for case in chosen for i, j in itertools.combinations(range(4), 2)}


def small_engine(
    kv_heads: int,
    head_dim: int,
    topology: str,
    quantize_kv: Literal["none", "int8"] = "none",
    slots: int = FEW,
    *,
    speculates: bool = False,
) -> Engine:
    """Two layers of a Llama with so many kv heads on each of eight chips; one object for one set of arguments."""
    return _engine(kv_heads, head_dim, topology, quantize_kv, slots, speculates)


@functools.cache
def _engine(
    kv_heads: int, head_dim: int, topology: str, quantize_kv: Literal["none", "int8"], slots: int, speculates: bool
) -> Engine:
    shape = LlamaConfig(
        num_layers=LAYERS, num_heads=16 * kv_heads, num_kv_heads=8 * kv_heads, head_dim=head_dim,
        model_dim=1024, ffn_dim=2048, vocab_size=VOCABULARY, context_length=8192, tied_embeddings=False,
        rope_theta=1e4, rms_norm_eps=1e-5,
    )  # fmt: skip
    config = EngineConfig(
        slots=slots,
        cache_length=CACHE_LENGTH,
        cache_tokens=CACHE_TOKENS,
        quantize_kv=quantize_kv,
        speculate="auto" if speculates else "off",
    )
    return abstract_engine(shape, topology, config)


@functools.lru_cache(maxsize=64)
def compiled(engine: Engine, program: str) -> Compiled:
    """`generate` of all slots or `generate_8`; `wide_4`, of all slots with four tokens each; `prefill` and `insert` of
    one piece of BUCKET tokens or `..._8x64`; `carry` of all slots and so many tokens. Several tests read what one
    compilation gives."""
    name, _, size = program.partition("_")
    if name == "generate":
        return compiled_once(lower_generate(engine, int(size) if size else None), engine.mesh)
    if name == "wide":
        return compiled_once(lower_generate(engine, engine.sizes.slots, int(size)), engine.mesh)
    if name == "carry":
        return compiled_once(lower_carry(engine, engine.sizes.slots, int(size)), engine.mesh)
    sizes = map(int, size.split("x")) if size else (1, BUCKET)
    return compiled_once({"insert": lower_insert, "prefill": lower_prefill}[name](engine, *sizes), engine.mesh)


def copies_of(hlo: Program, dtype: str, shape: tuple[int, ...]) -> list[str]:
    """Whole copies of such an array in HBM, in any branch."""
    instructions = [instruction for computation in hlo.computations.values() for instruction in computation.values()]
    return [
        instruction.name
        for instruction in instructions
        if instruction.opcode in ("copy", "copy-start")
        and any(
            (array.dtype, array.shape, array.is_on_chip) == (dtype, shape, False) for array in instruction.result[:1]
        )
    ]


def sampling_bytes(engine: Engine) -> int:
    """Of all slots: rows of token ids and biases, on every chip."""
    leaves = jax.tree.leaves(jax.eval_shape(engine.init_decode_state).sampling)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def moved_on_chip(hlo: Program, engine: Engine) -> list[str]:
    """Whole layers of the cache, or more, in VMEM or CMEM: rows that no slot uses would be read too."""
    layers = {
        leaf.sharding.shard_shape(leaf.shape)[1:] for leaf in jax.tree.leaves(engine.layout.abstract(engine.mesh))
    }
    return [
        instruction.name
        for computation in hlo.computations.values()
        for instruction in computation.values()
        if any(array.is_on_chip and array.shape[-4:] in layers for array in instruction.result)
    ]


def copies_of_new_rows(hlo: Program, engine: Engine, slots: int) -> list[str]:
    """Copies of all layers' rows of a step of so many slots, whatever axes of one stand among theirs."""
    layout = engine.layout
    shape = (layout.layers, slots, layout.kv_heads // engine.mesh.size, layout.shape[-1])
    wanted = [size for size in shape if size > 1]
    return [
        instruction.name
        for instruction in hlo.computations[hlo.entry].values()
        if instruction.opcode in ("copy", "transpose")
        and [size for size in instruction.result[0].shape if size > 1] == wanted
    ]


@pytest.mark.parametrize(("program", "kv_heads", "head_dim", "topology", "quantize_kv", "slots"), CASES)
def test_a_program_on_real_chips(program, kv_heads, head_dim, topology, quantize_kv, slots):
    """It compiles and fits, the donated cache and counts are updated in place, and nothing copies them."""
    drafts = program.startswith("wide")
    width = int(program.removeprefix("wide_")) if drafts else 1
    engine = small_engine(kv_heads, head_dim, topology, quantize_kv, slots, speculates=drafts)
    executable = compiled(engine, program)
    memory, hlo = memory_of(executable), Program(text_of(executable))
    cache_bytes = engine.layout.bytes // engine.mesh.size

    assert cache_copies(hlo, engine) == []
    assert moved_on_chip(hlo, engine) == []
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + cache_bytes < chip_of(topology).hbm_bytes
    if program.startswith("prefill"):
        assert hlo.pallas_calls() == {"chunk_attention": LAYERS}
        assert memory.temp_size_in_bytes < 0.05 * cache_bytes + 2.5 * 2**20  # v5p turns queries and rows around
    else:
        logits_bytes = 4 * slots * width * VOCABULARY // engine.mesh.size  # a sampled step holds a few of these
        room = 8.5 * logits_bytes + unpacked_mask_bytes(hlo, slots, VOCABULARY // engine.mesh.size)
        room += 2**20 if program.startswith("carry") else 0  # the piece beside the step
        assert memory.temp_size_in_bytes < 0.01 * cache_bytes + room + 2**20  # logits once in bfloat16
        state_bytes = cache_bytes + 2 * slots * VOCABULARY // engine.mesh.size  # a u16 a slot and token
        state_bytes += sampling_bytes(engine) + (4 * slots * CACHE_LENGTH if drafts else 0)  # the slots' texts
        assert state_bytes <= memory.alias_size_in_bytes < state_bytes + 64 * 1024  # the rest, and what tiles pad
        assert copies_of(hlo, "u16", (slots, VOCABULARY // engine.mesh.size)) == []  # count_BV
        if program.startswith("generate") and quantize_kv == "none":
            assert copies_of_new_rows(hlo, engine, int(program.partition("_")[2] or slots)) == []
        flushes = len(jax.tree.leaves(engine.layout.abstract(engine.mesh)))
        kernels = {"live_steps": 1, "ragged_attention": LAYERS, "cache_flush": flushes}
        kernels |= {"chunk_attention": LAYERS} if program.startswith("carry") else {}
        assert hlo.pallas_calls() == ({} if program.startswith("insert") else kernels)


@pytest.mark.gates
@pytest.mark.parametrize(("slots", "cache_length"), [(128, 2048), (32, 1024)])
def test_an_int8_cache_as_served(slots, cache_length):
    """Llama 3.1 8B on v5e-8: 64 and 8 MiB of scales a chip, which XLA once copied to VMEM and back in every step."""
    config = EngineConfig(
        model="llama-3.1-8b",
        slots=slots,
        cache_length=cache_length,
        cache_tokens=slots * cache_length,
        quantize_kv="int8",
    )
    engine = abstract_engine(PRESETS["llama-3.1-8b"], "v5e:2x4", config)
    hlo = Program(text_of(compiled_once(lower_generate(engine), engine.mesh)))
    assert cache_copies(hlo, engine) == []
    assert moved_on_chip(hlo, engine) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "quantize_kv"),
    [
        *((*read, "none") for read in READ),
        pytest.param(8, 64, "none", marks=pytest.mark.gates),
        pytest.param(1, 128, "int8", marks=pytest.mark.gates),
    ],
)
def test_what_one_program_leaves_the_next_takes_as_it_lies(kv_heads, head_dim, quantize_kv):
    """Prefill's prefix and the state have one layout in all programs: no relayout between them. Steps of fewer slots
    and those that carry a piece are compared for four kv heads a chip."""

    engine = small_engine(kv_heads, head_dim, "v5e:2x4", quantize_kv=quantize_kv)
    prefill, insert = compiled(engine, "prefill"), compiled(engine, "insert")
    others = () if (kv_heads, head_dim) == READ[0] else ("generate_8", "carry_256")
    steps = {program: compiled(engine, program) for program in ("generate", *others)}
    (_, read, *_), _ = prefill.inputs
    (prefix, state_in, *_), _ = insert.inputs
    states = [state_in, insert.outputs]
    for step in steps.values():
        (_, state, *_), _ = step.inputs
        states += [state, step.outputs[0]]
    carried = [step.outputs[2] for program, step in steps.items() if program.startswith("carry")]
    for given in (prefill.outputs, *carried):
        for leaf in ("kv", "count_NV"):
            assert jax.tree.leaves(getattr(given, leaf)) == jax.tree.leaves(getattr(prefix, leaf))
    for leaf in ("cache", "count_BV"):
        of_states = [jax.tree.leaves(getattr(layouts, leaf)) for layouts in states]
        assert of_states == of_states[:1] * len(states)
    leaves = jax.tree.leaves(read)
    assert leaves == jax.tree.leaves(state_in.cache)
    assert "None" not in leaves


@pytest.mark.slow
def test_the_programs_beside_the_step():
    """Scoring flushes in place like a step; first tokens leave the logits where they lie."""
    engine = small_engine(4, 128, "v5e:2x4")
    scoring = compiled_once(lower_score_step(engine), engine.mesh)
    hlo = Program(text_of(scoring))
    assert cache_copies(hlo, engine) == []
    assert hlo.pallas_calls() == {"live_steps": 1, "ragged_attention": LAYERS, "cache_flush": 1}
    assert memory_of(scoring).alias_size_in_bytes >= engine.layout.bytes // engine.mesh.size

    for pieces in (1, 8):
        rows = (pieces,) if pieces > 1 else ()
        first = Program(text_of(compiled_once(lower_first_tokens(engine, pieces), engine.mesh)))
        assert first.floats_of((*rows, VOCABULARY // engine.mesh.size))  # a chip's share is there
        assert first.floats_of((*rows, VOCABULARY)) == []


@pytest.mark.parametrize(
    "program",
    ["generate", "prefill_512", *(pytest.param(name, marks=pytest.mark.gates) for name in ("generate_8", "carry"))],
)
@pytest.mark.parametrize(
    ("model", "topology", "slots", "cache_length"),
    [
        pytest.param("llama-3.1-8b", "v5e:2x4", 512, 32768, marks=pytest.mark.gates),
        pytest.param("llama-3.1-8b", "v5e:2x4", 16, 131072, marks=pytest.mark.slow),
        pytest.param("llama-3.1-8b", "v6e:2x4", 512, 32768, marks=pytest.mark.gates),
        pytest.param("llama-3.1-70b", "v5p:2x2x2", 256, 131072, marks=pytest.mark.gates),
    ],
)
def test_long_requests_share_what_memory_leaves(model, topology, slots, cache_length, program):
    """Lists of live pages stand in scalar memory, whatever the table could hold; the cache is what is left."""
    config = EngineConfig(model=model, slots=slots, cache_length=cache_length)
    engine = abstract_engine(PRESETS[model], topology, config)
    name, _, size = program.partition("_")
    if name == "carry":
        lowered = lower_carry(engine, *engine.shapes.carries[-1])
    elif name == "generate":
        lowered = lower_generate(engine, int(size or slots))
    else:
        lowered = lower_prefill(engine, 1, int(size))
    executable = compiled_once(lowered, engine.mesh)
    assert cache_copies(Program(text_of(executable)), engine) == []
    memory = memory_of(executable)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < chip_of(topology).hbm_bytes


@pytest.mark.slow
def test_no_step_sorts_the_vocabulary():
    """A sort of it takes the compiler 23 s by itself, and the chip more than the rest of the sampler. What is sorted is
    what every chip found likeliest."""
    for instruction in instructions_of("generate"):
        if instruction.opcode == "sort":
            assert instruction.result[0].shape == (FEW, 8 * MAX_LOGPROBS)


@pytest.mark.slow
def test_no_chip_gathers_the_logits():
    """Whatever a slot asks for: penalties, cuts, draws and logprobs are each chip's own, over its share of V."""
    gathered = [
        sum(array.bytes for array in instruction.result)
        for instruction in instructions_of("generate")
        if instruction.opcode.removesuffix("-start") in ("all-gather", "all-to-all", "collective-permute")
    ]
    assert gathered
    assert max(gathered) <= 4 * FEW * 8 * MAX_LOGPROBS


@pytest.mark.slow
def test_a_slot_that_asks_for_nothing_pays_for_nothing():
    """The step outside its conditionals has one pass over the logits: the argmax, and its two small gathers."""
    generate = Program(text_of(compiled(small_engine(1, 64, "v5e:2x4"), "generate")))
    assert generate.collectives() == {"all-reduce": 2 * LAYERS + 1, "all-gather": 2}


@pytest.mark.slow
def test_a_residual_sum_is_part_of_the_norm_that_reads_it():
    """Of both sums of a layer none is an operation by itself."""
    engine = small_engine(1, 64, "v5e:2x4")
    hlo = Program(text_of(compiled(engine, "generate")))
    loops = [instruction for instruction in hlo.computations[hlo.entry].values() if instruction.opcode == "while"]
    assert loops
    sums = [
        instruction.name
        for loop in loops
        for callee in loop.callees
        for instruction in hlo.computations[callee].values()
        if instruction.opcode == "add" and instruction.result[0].shape == (FEW, 1024)
    ]
    assert sums == []


@pytest.mark.slow
def test_prompt_logprobs_never_hold_all_logits():
    """T x V in float32 would be 16 MiB on each of eight chips."""
    bucket = 1024
    engine = small_engine(1, 64, "v5e:2x4")
    memory = memory_of(compiled_once(lower_prefill(engine, 1, bucket), engine.mesh))
    assert memory.temp_size_in_bytes < 4 * bucket * VOCABULARY // engine.mesh.size / 2


def instructions_of(program: str) -> list[Instruction]:
    hlo = Program(text_of(compiled(small_engine(1, 64, "v5e:2x4"), program)))
    return [instruction for computation in hlo.computations.values() for instruction in computation.values()]


@pytest.mark.slow
def test_the_gate_sees_a_copy_where_there_is_one():
    """The eager design as one writes it first: an XLA scatter in each layer meets a Pallas call on one cache."""
    engine = small_engine(4, 128, "v5e:2x4")
    eager = eager_twin(engine, "stacked", scatter="sliced")
    executable = compiled_once(lower_score_step(eager), engine.mesh)
    assert cache_copies(Program(text_of(executable)), engine) != []
    assert memory_of(executable).temp_size_in_bytes > 0.5 * engine.layout.bytes // engine.mesh.size


@pytest.mark.slow
@pytest.mark.parametrize("generation", CHIPS)
def test_the_chips_table_says_what_the_compiler_says(generation):
    """HBM limits come from its out-of-memory message, to its two digits."""
    from slipstream.engine_impl.compiler.topology import devices_of

    chip = CHIPS[generation]
    mesh = jax.sharding.Mesh(devices_of(f"{generation}:{chip.topologies[0]}")[:1], ("x",))
    spec = jax.NamedSharding(mesh, jax.P())
    huge = jax.ShapeDtypeStruct((2**20, 2**20), "float32", sharding=spec)
    limit = f"available HBM ({chip.hbm_bytes / 2**30:.2f}G)"
    with pytest.raises(jax.errors.JaxRuntimeError) as told:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    assert limit in str(told.value)
