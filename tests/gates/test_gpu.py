"""Gates: the engine's own programs, compiled by XLA's GPU compiler for an H100 that is not here (`make gpu-gates`)."""

import itertools
import math

import pytest
from slipstream.engine_impl.compiler.chips import chip_of
from slipstream.engine_impl.compiler.hlo import Program
from slipstream.engine_impl.compiler.plan import abstract_engine
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.models.llama import LlamaConfig
from slipstream.kernels.ragged_attention.xla_gpu import BLOCK_BYTES

from .test_programs import LAYERS, MANY, PROGRAMS, VOCABULARY, compiled

pytestmark = pytest.mark.gpu_gates
CACHE_LENGTH, FFN_DIM = 2048, 14336

CASES = [  # program, query heads a kv head, head dim, GPUs, cache
    *itertools.product(("generate",), (1, 4, 7), (64, 128), (1,), ("none", "int8")),
    *itertools.product(PROGRAMS, (1, 4), (128,), (2,), ("none",)),
]


@pytest.mark.parametrize(
    ("program", "group", "head_dim", "gpus", "quantize_kv"),
    CASES,
)
def test_a_program_on_a_gpu(program, group, head_dim, gpus, quantize_kv):
    """The donated cache is updated in place, and neither it nor a matrix is copied, however heads are grouped."""
    shape = LlamaConfig(
        num_layers=LAYERS, num_heads=8 * group, num_kv_heads=8, head_dim=head_dim, model_dim=2048, ffn_dim=FFN_DIM,
        vocab_size=VOCABULARY, context_length=8192, tied_embeddings=False, rope_theta=1e4, rms_norm_eps=1e-5,
    )  # fmt: skip
    config = EngineConfig(
        slots=MANY, cache_length=CACHE_LENGTH, cache_tokens=MANY * CACHE_LENGTH,
        quantize_kv=quantize_kv,
    )  # fmt: skip
    engine = abstract_engine(shape, f"h100:{gpus}", config)
    executable = compiled(engine, program)
    memory, hlo = executable.memory_analysis(), Program(executable.as_text())
    cache_bytes = engine.layout.bytes // engine.mesh.size

    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < chip_of(f"h100:{gpus}").hbm_bytes
    rows = engine.layout.abstract(engine.mesh).rows  # scales are smaller than the scores that come of them
    of_chip = rows.sharding.shard_shape(rows.shape)
    assert hlo.copies_of(of_chip, math.prod(of_chip[1:]) * rows.dtype.itemsize // 2) == []
    for shape_of_chip in ((FFN_DIM // gpus, 2048), (2048, FFN_DIM // gpus)):
        assert hlo.copies_of(shape_of_chip, 2 * 2048 * FFN_DIM // gpus) == []
    if program != "prefill":
        logits_bytes = 4 * MANY * VOCABULARY // gpus
        assert memory.temp_size_in_bytes < BLOCK_BYTES // 4 + 8 * logits_bytes, "no block of rows is written"
        assert memory.alias_size_in_bytes >= cache_bytes
