"""The engine with an int8 KV cache against itself with a plain one."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from slipstream.engine_impl.session import Session

from .tiny_models import TINY, greedy, tiny_engine

PROMPTS = [[5, 17, 80, 3, 3, 99, 41], [1] * 20, [7]]
STEPS = 200


def forced_logprobs(engine, params, steps):
    """Log-probabilities [steps, slots] of pseudo-random texts in the slots' tails, slot 3 empty."""
    session = Session(engine, params)
    for slot, prompt in enumerate(PROMPTS):
        session.start(slot, prompt)
    given = np.random.default_rng(5).integers(0, 101, (steps, 3)).astype(np.int32)
    return np.array([np.asarray(session.score(token_N))[:3] for token_N in given]), session.state


@pytest.mark.slow
def test_200_steps_stay_close_to_the_plain_cache():
    """Rounding shows, but does not grow with the text. The model's scores are large, its vocabulary is small: log-
    probabilities are spread over several units."""
    plain, _ = forced_logprobs(*tiny_engine(cache_length=256), STEPS)
    int8, state = forced_logprobs(*tiny_engine(cache_length=256, quantize_kv="int8"), STEPS)
    assert list(np.asarray(state.length_B)) == [len(prompt) + STEPS for prompt in PROMPTS] + [0]
    error = np.abs(int8 - plain)
    assert 1e-4 < error.mean() < 0.05 * plain.std()
    assert error[STEPS // 2 :].mean() < 2 * error[: STEPS // 2].mean()
    assert plain.std() > 1, "log-probabilities that are all alike would prove nothing"


def test_steps_store_what_prefill_stores():
    """The step's rows are encoded as the prompt's are; nothing but its row is written."""
    engine, params = tiny_engine(quantize_kv="int8")
    prompt = PROMPTS[0]
    session = Session(engine, params)
    first = session.start(1, prompt)
    before = jax.tree.map(np.array, session.state.cache)
    session.step()
    after = jax.tree.map(np.array, session.state.cache)
    longer = session.prefilled(1, [*prompt, int(first.token_BW[0, 0])])
    row = len(prompt)
    assert longer.kv.scales is not None
    np.testing.assert_allclose(after.scales[:, 1, :, :, row], longer.kv.scales[:, :, :, row], rtol=0.05)
    codes = after.rows[:, 1, :, row].astype(int)
    assert np.abs(codes - np.asarray(longer.kv.rows[:, :, row], int)).max() <= 4
    before.rows[:, 1, :, row], before.scales[:, 1, :, :, row] = codes, after.scales[:, 1, :, :, row]
    np.testing.assert_array_equal(after.rows, before.rows)
    np.testing.assert_array_equal(after.scales, before.scales)


@pytest.mark.slow
def test_eight_devices_give_the_tokens_of_one():
    """A head's scales are its own, so that no sharding changes them."""
    config = replace(TINY, num_kv_heads=8)
    one = greedy(*tiny_engine(config, quantize_kv="int8"), PROMPTS, 25)
    engine, params = tiny_engine(config, devices=8, quantize_kv="int8")
    assert greedy(engine, params, PROMPTS, 25) == one
    cache = engine.init_decode_state().cache
    assert [leaf.addressable_shards[0].data.shape[2] for leaf in jax.tree.leaves(cache)] == [1, 1]
    assert engine.layout.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
