"""Engines on a CPU with native kernels: their weights lie in panels, and their tokens are those of XLA's path."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.benchmarks.baselines.xla import xla_twin
from slipstream.engine_impl import bridge
from slipstream.engine_impl.api import Piece
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.forward import numbered, told_padding
from slipstream.engine_impl.loading import build_engine
from slipstream.engine_impl.quantization.panels import PanelEmbedding, PanelLinear, PanelWeight
from slipstream.engine_impl.session import Session

from ..tiny_models import TINY, RandomCheckpoint, greedy

SHAPE = replace(TINY, model_dim=64, ffn_dim=96)  # blocks of 32
TIED = replace(SHAPE, tied_embeddings=True)
PROMPTS = [[5, 17, 3], [90, 2, 41, 8, 60, 77, 13] * 4]
PRODUCT = (pytest.mark.slow, pytest.mark.product)


def engine_with(shape, devices=1, **options):
    checkpoint = RandomCheckpoint(shape)
    config = EngineConfig(slots=4, cache_length=128, max_prefill_length=64, tensor_parallel=devices, **options)
    engine = build_engine(config, checkpoint)
    return engine, engine.parameters.load(checkpoint)


def kinds(engine):
    return {part.kind for part in engine.model.modules() if isinstance(part, PanelWeight)}


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({}, TIED, {"float32"}),
        pytest.param({"dtype": "bfloat16"}, TIED, {"bfloat16"}, marks=pytest.mark.slow),
        pytest.param(
            {"dtype": "bfloat16", "quantize_weights": "int8"}, SHAPE, {"bfloat16", "int8"}, marks=pytest.mark.slow
        ),
        pytest.param({"quantize_weights": "int4"}, TIED, {"float32", "int4"}, marks=pytest.mark.slow),
        pytest.param(
            {"quantize_weights": "int4", "quantize_exclude": ()}, TIED, {"int8", "int4"}, marks=pytest.mark.slow
        ),
        pytest.param({"quantize_kv": "int8"}, SHAPE, {"float32"}, marks=pytest.mark.slow),
        # A head of its own and int8 codes are above, each beside something else:
        pytest.param({}, SHAPE, {"float32"}, marks=PRODUCT),
        pytest.param({"quantize_weights": "int8"}, SHAPE, {"float32", "int8"}, marks=PRODUCT),
    ],
)
def test_tokens_are_those_of_xla(options, shape, expected):
    engine, params = engine_with(shape, **options)
    assert engine.programs.backend == "native_cpu", "build the native kernels: make setup"
    assert kinds(engine) == expected
    assert engine.layout.dtype == jnp.float32, "of activations and cache, whatever the weights are"
    twin = xla_twin(engine, params)
    assert twin[0].programs.backend == "xla"
    assert greedy(engine, params, PROMPTS, 12) == greedy(*twin, PROMPTS, 12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "bfloat16"}, {"code": "bfloat16"}),
        ({"quantize_weights": "int4"}, {"code": "float32"}),
        ({"quantize_weights": "int4", "quantize_exclude": ()}, {"code": "int8", "scale": "float32"}),
    ],
)
def test_a_tied_embedding_lies_there_once(options, expected):
    """And is looked up and multiplied as the same values."""
    engine, params = engine_with(TIED, **options)
    assert type(engine.model.embed_tokens) is PanelEmbedding
    assert type(engine.model.lm_head) is PanelLinear
    assert params["lm_head"] is params["embed_tokens"]
    assert {name: leaf.dtype.name for name, leaf in params["embed_tokens"].items()} == expected
    looked_up_VD = bridge.run(engine.model.embed_tokens, params["embed_tokens"], jnp.arange(TIED.vocab_size))
    head = params["lm_head"] | numbered(engine.model.lm_head, jnp.int32(0))
    head |= told_padding(engine.model.lm_head, jnp.ones(TIED.model_dim, bool))
    multiplied_DV = bridge.run(engine.model.lm_head, head, jnp.eye(TIED.model_dim))
    np.testing.assert_array_equal(looked_up_VD, multiplied_DV.T)


def test_padding_changes_no_bit_of_a_piece():
    """Of a piece in a longer program, and beside a shorter piece and none."""
    engine, params = engine_with(SHAPE)
    session = Session(engine, params)
    pieces = [Piece(token_T=np.array(prompt, np.int32), start=0, page_J=session.page_BJ[0]) for prompt in PROMPTS]

    def prefilled(*of, shape):
        batch = engine.shapes.pieces(of, shape)
        return engine.jitted.prefill(params, session.state.cache, batch, session.state.draft_cache)

    alone, padded = (prefilled(pieces[1], shape=(1, tokens)) for tokens in (28, 64))
    together = prefilled(*pieces, shape=(4, 32))
    for prefix, n in ((padded, 0), (together, 1)):
        np.testing.assert_array_equal(prefix.logits_NV[n], alone.logits_NV[0])
        tokens = prefix.kv.rows.shape[2] // len(prefix.logits_NV)
        rows_LKTC = prefix.kv.rows[:, :, n * tokens : n * tokens + 28]
        np.testing.assert_array_equal(rows_LKTC, alone.kv.rows)
        assert np.isfinite(prefix.kv.rows).all()
    assert np.isfinite(together.logits_NV).all()


def test_a_rope_is_computed_once_for_all_layers():
    engine, params = engine_with(SHAPE)
    state, no_pages = engine.init_decode_state(), np.zeros(0, np.int32)
    batch = engine.shapes.pieces([Piece(token_T=np.zeros(16, np.int32), start=0, page_J=no_pages)])
    program = engine.jitted.prefill.lower(params, state.cache, batch, state.draft_cache).compile()
    assert SHAPE.num_layers > 1
    assert (program.as_text() or "").count(" cosine(") == 1


def test_several_devices_have_no_panels():
    engine, params = engine_with(TINY, devices=2)
    assert kinds(engine) == set()
    with pytest.raises(RefusedError, match="versus='xla' is for engines whose products are all native"):
        xla_twin(engine, params)


def test_without_native_kernels_weights_lie_as_they_come(without_native_kernels):
    engine, _ = engine_with(TINY, dtype="bfloat16")
    assert (kinds(engine), engine.programs.backend, engine.layout.dtype) == (set(), "xla", jnp.dtype("bfloat16"))
