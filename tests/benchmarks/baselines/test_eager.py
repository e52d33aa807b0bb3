"""The eager baseline is the same model: equal tokens, whatever the form of its cache."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from slipstream.benchmarks.baselines.eager import eager_twin
from slipstream.engine_impl.assembly import twin
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.loading import build_engine
from slipstream.engine_impl.session import Session

from tests.engine_impl.tiny_models import TINY, RandomCheckpoint, greedy, tiny_engine

PROMPTS = [[5, 6, 7], list(range(1, 13)), [9]]  # of four slots: one stays dead
STEPS = 8


@pytest.fixture(scope="module")
def sharded():
    """Over four devices: (engine, params, its greedy tokens)."""
    engine, params = tiny_engine(devices=4)
    return engine, params, greedy(engine, params, PROMPTS, STEPS)


def stacked_layers(engine, checkpoint):
    """Params as a TPU's: all layers' weights in one array, walked by a scan."""
    params = twin(engine, layer_loop="scan").parameters.load(checkpoint)
    assert params["alike"]
    return params


@pytest.mark.slow
@pytest.mark.parametrize(("form", "loop"), [("stacked", "unrolled"), ("stacked", "scan"), ("per_layer", "unrolled")])
def test_greedy_tokens_are_ours_and_a_full_slot_is_not_written(form, loop, sharded):
    """Guards the scatter's mode too: at row S, a clamped write would overwrite the last token."""
    engine, params, expected = sharded
    params = stacked_layers(engine, RandomCheckpoint(TINY)) if loop == "scan" else params
    eager = eager_twin(engine, form)
    assert greedy(eager, params, PROMPTS, STEPS) == expected

    session = Session(eager, params)
    session.start(0, PROMPTS[0])
    full_B = np.array([engine.sizes.cache_length, 0, 0, 0], np.int32)
    length_B = jax.device_put(full_B, session.state.length_B.sharding)
    session.state = replace(session.state, length_B=length_B)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(session.state.cache.rows)]
    session.slots = [0, 1, 2, 3]
    assert session.step().token_BW.tolist() == [[-1], [-1], [-1], [-1]]
    for old, new in zip(before, jax.tree.leaves(session.state.cache.rows), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))


@pytest.mark.slow
def test_int4_weights_that_are_read_from_the_stack():
    checkpoint = RandomCheckpoint(replace(TINY, ffn_dim=64))
    config = EngineConfig(slots=4, cache_length=128, quantize_weights="int4", quantize_block=32, tensor_parallel=1)
    engine = build_engine(config, checkpoint)
    params = engine.parameters.load(checkpoint)
    expected = greedy(engine, params, PROMPTS, 4)
    for of_loop in (params, stacked_layers(engine, checkpoint)):  # unrolled, and a scan
        assert greedy(eager_twin(engine, "stacked"), of_loop, PROMPTS, 4) == expected
