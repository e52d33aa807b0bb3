"""Gates: programs of an engine with adapters, compiled by the real TPU compiler."""

import functools
from typing import Any, Literal

import jax
import pytest
from slipstream.engine_impl.compiler.budget import cache_copies
from slipstream.engine_impl.compiler.hlo import Program
from slipstream.engine_impl.compiler.lowering import lower_generate, lower_prefill
from slipstream.engine_impl.compiler.plan import abstract_engine
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.models.llama import LlamaConfig
from slipstream.engine_impl.sizes import device_bytes

from tests.tpu import compiled_once, memory_of, text_of

SLOTS, CACHE_LENGTH, CACHE_TOKENS, LAYERS = 16, 4096, 64 * 4096, 2


@functools.cache
def engine_of(weights: Literal["none", "int8", "int4"] = "none", *, max_adapters: int = 4) -> Engine:
    """Two layers of a Llama with one kv head on each of eight chips."""
    shape = LlamaConfig(
        num_layers=LAYERS, num_heads=16, num_kv_heads=8, head_dim=128, model_dim=1024, ffn_dim=2048, vocab_size=4096,
        context_length=8192, tied_embeddings=False, rope_theta=1e4, rms_norm_eps=1e-5,
    )  # fmt: skip
    sizes: dict[str, Any] = {"slots": SLOTS, "cache_length": CACHE_LENGTH, "cache_tokens": CACHE_TOKENS}
    config = EngineConfig(**sizes, quantize_weights=weights, max_adapters=max_adapters)
    return abstract_engine(shape, "v5e:2x4", config)


def branches(hlo: Program) -> list[set[str]]:
    """Opcodes of the branches of the conditional that has the layers."""
    loops = [
        [{i.opcode for i in hlo.computations[callee].values()} for callee in instruction.callees]
        for instruction in hlo.computations[hlo.entry].values()
        if instruction.opcode == "conditional"
    ]
    return next(of_one for of_one in loops if all("while" in opcodes for opcodes in of_one))


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights", ["none", *(pytest.param(kind, marks=pytest.mark.gates) for kind in ("int8", "int4"))]
)
@pytest.mark.parametrize("program", ["generate", "prefill"])
def test_a_program_with_adapters(program, weights):
    """It copies neither the cache nor the adapters, and a step in which nobody uses one walks the layers without."""
    engine = engine_of(weights)
    lowered = lower_generate(engine) if program == "generate" else lower_prefill(engine, 1, 256)
    executable = compiled_once(lowered, engine.mesh)
    memory, hlo = memory_of(executable), Program(text_of(executable))
    assert cache_copies(hlo, engine) == []
    assert len(branches(hlo)) == 2
    stacks = jax.tree.leaves(engine.parameters.abstract()["adapters"])
    assert memory.temp_size_in_bytes < 0.01 * engine.layout.bytes // engine.mesh.size + 2 * 2**20
    if program == "prefill":
        return
    assert memory.alias_size_in_bytes >= engine.layout.bytes // engine.mesh.size
    for stack in {stack.sharding.shard_shape(stack.shape): stack for stack in stacks}.values():
        assert hlo.copies_of(stack.sharding.shard_shape(stack.shape), device_bytes([stack])) == []


@pytest.mark.gates
def test_programs_without_adapters_have_no_branches():
    engine = engine_of(max_adapters=0)
    hlo = Program(text_of(compiled_once(lower_generate(engine), engine.mesh)))
    with pytest.raises(StopIteration):
        branches(hlo)
