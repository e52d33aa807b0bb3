"""The eager baseline is the same model: equal tokens, whatever the form of its cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.benchmarks.baselines.eager import eager_twin
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.loading import build_engine

from tests.engine_impl.tiny_models import TINY, RandomCheckpoint, greedy, tiny_engine

PROMPTS = [[5, 6, 7], list(range(1, 13)), [9]]  # of four slots: one stays dead
STEPS = 8


@pytest.fixture(scope="module")
def sharded():
    """Over four devices: (engine, params, its greedy tokens)."""
    engine, params = tiny_engine(devices=4)
    return engine, params, greedy(engine, params, PROMPTS, STEPS)


def stacked_layers(params):
    """Params as a TPU's: all layers' weights in one array, walked by a scan."""
    return {**params, "layers": jax.tree.map(lambda *weights: jnp.stack(weights), *params["layers"])}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "loop"), [("stacked", "unrolled"), ("stacked", "scan"), ("per_layer", "unrolled")])
def test_greedy_tokens_are_ours_and_a_full_slot_is_not_written(form, loop, sharded):
    """Guards the scatter's mode too: at row S, a clamped write would overwrite the last token."""
    engine, params, expected = sharded
    params = stacked_layers(params) if loop == "scan" else params
    eager = eager_twin(engine, form)
    assert eager.jitted.prefill is engine.jitted.prefill  # not compiled twice
    assert greedy(eager, params, PROMPTS, STEPS) == expected

    prefix, _ = eager.prefill(sharded[1], *eager.pad(PROMPTS[0]))
    state = eager.insert(prefix, eager.init_decode_state(), 0)
    full_B = np.array([engine.cache_length, 0, 0, 0], np.int32)
    state = replace(state, length_B=jax.device_put(full_B, state.length_B.sharding))
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.cache.rows)]
    state, result = eager.generate(params, state)
    assert result.token_BW.tolist() == [[-1], [-1], [-1], [-1]]
    for old, new in zip(before, jax.tree.leaves(state.cache.rows), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_int4_weights_that_are_read_from_the_stack(loop):
    checkpoint = RandomCheckpoint(replace(TINY, ffn_dim=64))
    config = EngineConfig(slots=4, cache_length=128, quantize_weights="int4", quantize_block=32, tensor_parallel=1)
    engine = build_engine(config, checkpoint)
    params = engine.load_params(checkpoint)
    expected = greedy(engine, params, PROMPTS, 4)
    eager = eager_twin(engine, "stacked")
    state = eager.init_decode_state()
    for slot, prompt in enumerate(PROMPTS):
        prefix, _ = eager.prefill(params, *eager.pad(prompt))
        state = eager.insert(prefix, state, slot)
    params, tokens = stacked_layers(params) if loop == "scan" else params, []
    for _ in range(3):
        state, result = eager.generate(params, state)
        tokens.append(result.token_BW[:3, 0].tolist())
    assert [list(answer) for answer in zip(*tokens, strict=True)] == [answer[1:] for answer in expected]
