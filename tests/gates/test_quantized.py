"""Gates: programs with quantised weights, as they will run on real chips. No weight becomes an array of floats, and no
kernel's stack of weights is copied, to VMEM neither."""

import itertools
import math

import pytest
from jax.experimental.pallas import tpu as pltpu
from slipstream.engine_impl import parameters
from slipstream.engine_impl.compiler.budget import cache_copies
from slipstream.engine_impl.compiler.hlo import Program
from slipstream.engine_impl.compiler.lowering import lower_score_step
from slipstream.engine_impl.compiler.plan import abstract_engine
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.models.llama import LlamaConfig

from ..tpu import compiled_once, unpacked_mask_bytes
from .test_programs import CACHE_LENGTH, CACHE_TOKENS, FEW, LAYERS, compiled

MODES = {
    "int8": {"quantize_weights": "int8"},
    "int8x8": {"quantize_weights": "int8", "quantize_activations": "int8"},
    "int4": {"quantize_weights": "int4"},
    "int4-128": {"quantize_weights": "int4", "quantize_block": 128},
}
SHAPE = LlamaConfig(
    num_layers=LAYERS, num_heads=32, num_kv_heads=8, head_dim=128, model_dim=2048, ffn_dim=5120, vocab_size=32768,
    context_length=8192, tied_embeddings=False, rope_theta=1e4, rms_norm_eps=1e-5,
)  # fmt: skip
LOCAL = [("v5e:2x4", mode, program) for mode in ("int8", "int4") for program in ("generate", "prefill")]
LOCAL += [("v5e:2x4", "int8x8", "generate")]
PRODUCT = itertools.product(("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "v4:2x2x1"), MODES, ("generate", "prefill"))


def copied_stacks(hlo: Program, engine: Engine) -> list[str]:
    """Copies of a layer's codes, scales or offsets, or of all layers', in HBM or VMEM, of those that make whole tiles
    of 8 and 128; kernels read them where they lie."""
    shapes = {
        leaf.sharding.shard_shape(leaf.shape): leaf.dtype.itemsize
        for name, leaf in engine.parameters.abstract()["layers"].items()
        if name.endswith(("packed", "scale", "offset"))
    }
    whole = {shape: size for shape, size in shapes.items() if shape[-2] % 8 == 0 and shape[-1] % 128 == 0}
    return [
        copy
        for shape, size in whole.items()
        for copy in hlo.copies_of(shape, size * math.prod(shape[1:]), on_chip=True)
    ]


@pytest.mark.parametrize(
    ("topology", "mode", "program"),
    [pytest.param(*case, marks=pytest.mark.slow if case in LOCAL else pytest.mark.gates) for case in PRODUCT],
)
def test_codes_stay_codes(topology, mode, program):
    config = EngineConfig(slots=FEW, cache_length=CACHE_LENGTH, cache_tokens=CACHE_TOKENS, **MODES[mode])
    engine = abstract_engine(SHAPE, topology, config)
    executable = compiled(engine, program)
    hlo, memory = Program(executable.as_text()), executable.memory_analysis()
    cache_bytes, chips = engine.layout.bytes // engine.mesh.size, engine.mesh.size

    for outputs, inputs in ((5120 // chips, 2048), (2048, 5120 // chips), (4096 // chips, 2048), (2048, 4096 // chips)):
        assert hlo.floats_of((outputs, inputs)) == []
    assert hlo.pallas_calls().get("blockwise_matmul", 0) == (7 * LAYERS if "int4" in mode else 0)
    if "int4" in mode:
        assert copied_stacks(hlo, engine) == []
    if program == "generate":
        assert cache_copies(hlo, engine) == []
        assert hlo.collectives()["all-reduce"] == 2 * LAYERS + 1
        logits_bytes = 4 * FEW * SHAPE.vocab_size // chips
        room = 8 * logits_bytes + unpacked_mask_bytes(hlo, FEW, SHAPE.vocab_size // chips)
        assert memory.temp_size_in_bytes < 0.01 * cache_bytes + room + 2**20


@pytest.mark.slow
def test_scales_that_lie_alike_are_taken_from_their_stacks_together(monkeypatch):
    """Both norms' weights, and the scales of k and v, of o and down: three operations a layer fewer."""
    config = EngineConfig(slots=FEW, cache_length=CACHE_LENGTH, cache_tokens=CACHE_TOKENS, **MODES["int8"])
    engine = abstract_engine(SHAPE, "v5e:2x4", config)

    def operations() -> int:
        return Program(compiled_once(lower_score_step(engine), engine.mesh).as_text()).operations()

    together = operations()
    monkeypatch.setattr(parameters, "joined_shapes", lambda model, shapes: shapes | {"alike": {}})
    assert together <= operations() - 3 * LAYERS


@pytest.mark.gates
def test_left_alone_the_compiler_would_move_all_layers_weights_to_vmem(monkeypatch):
    """Why `blockwise_matmul` keeps them in HBM; and that the gate sees it."""
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda stack, memory_space: stack)
    config = EngineConfig(slots=FEW, cache_length=CACHE_LENGTH, cache_tokens=CACHE_TOKENS, **MODES["int4"])
    engine = abstract_engine(SHAPE, "v5e:2x4", config)
    hlo = Program(compiled_once(lower_score_step(engine), engine.mesh).as_text())
    assert copied_stacks(hlo, engine) != []
