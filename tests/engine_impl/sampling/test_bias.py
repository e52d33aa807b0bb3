"""What is added to single logits, against transformers and by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from slipstream.engine_impl.sampling import bias, choose
from slipstream.engine_impl.sampling.mask import Mask
from slipstream.engine_impl.sampling.params import MAX_BIASES, SamplingParams
from slipstream.engine_impl.sampling.slots import SlotSampling

from tests.arrays import array

VOCABULARY = 400
biased, without_ends = jax.jit(bias.biased), jax.jit(bias.without_ends)


def logits(slots, seed=0):
    return np.random.default_rng(seed).normal(size=(slots, VOCABULARY)).astype(np.float32) * 4


def text(slots: int, length: int) -> Any:
    """Whatever has been said: the processors look at its length alone."""
    return torch.zeros((slots, length), dtype=torch.long)


def slots(*params, model_stop_ids=()):
    rows = [SlotSampling.of(one, model_stop_ids) for one in params]
    return jax.tree.map(lambda *values: np.stack(values), *rows)


@jax.jit
def sample(logits_BV, count_BV, sampling, position_B):
    return choose.sample(logits_BV, lambda: count_BV, sampling, position_B, Mask.nothing(*logits_BV.shape))


def chosen(logits_BV, sampling, position_B):
    nothing_said_BV = jnp.zeros(logits_BV.shape, jnp.uint16)
    return sample(logits_BV, nothing_said_BV, sampling, array(position_B)).tolist()


BIASES = [
    {3: 5.0, 399: -100.0, 0: 0.25},
    {},
    {token_id: token_id / 3 - 50 for token_id in range(50, 50 + MAX_BIASES)},
]


def test_bias_is_transformers_and_others_keep_their_logits_to_the_bit():
    from transformers import SequenceBiasLogitsProcessor

    logits_BV = logits(3)
    biased_BV = np.asarray(biased(array(logits_BV), slots(*[SamplingParams(logit_bias=added) for added in BIASES])))
    for slot, added in enumerate(BIASES):
        expected = torch.tensor(logits_BV[slot : slot + 1])
        if added:
            processor = SequenceBiasLogitsProcessor([[[token_id], value] for token_id, value in added.items()])
            expected = processor(text(1, 4), expected)
        np.testing.assert_allclose(biased_BV[slot], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(biased_BV[1], logits_BV[1])


@pytest.mark.parametrize("chips", [1, 8])
def test_chips_that_share_the_vocabulary_add_what_one_does(chips):
    logits_BV = logits(3)
    sampling = slots(*[SamplingParams(logit_bias=added) for added in BIASES])
    mesh = Mesh(np.array(jax.devices()[:chips]), ("tensor",))
    shared = jax.device_put(logits_BV, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    expected = logits_BV.copy()
    for slot, added in enumerate(BIASES):
        for token_id, value in added.items():
            expected[slot, token_id] += np.float32(value)
    np.testing.assert_array_equal(biased(shared, sampling), expected)


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("generated", [0, 1, 2, 4, 5, 6])
def test_the_least_length_is_transformers(min_tokens, generated):
    """The prompt has 7 tokens, so the next token stands at position 7 + generated. Two sources name token 9."""
    from transformers import MinNewTokensLengthLogitsProcessor

    prompt, ends = 7, [5, 9, 399]
    logits_BV = logits(2)
    processor = MinNewTokensLengthLogitsProcessor(prompt, min_tokens, ends)
    expected = processor(text(2, prompt + generated), torch.tensor(logits_BV))
    params = SamplingParams(min_tokens=prompt + min_tokens, stop_token_ids=(5, 9))  # counted from the beginning
    sampling = slots(params, params, model_stop_ids=(9, 399))
    position_B = jnp.full(2, prompt + generated)
    np.testing.assert_array_equal(without_ends(array(logits_BV), sampling, position_B), expected)


def test_a_biased_token_is_chosen_and_a_forbidden_one_never():
    """Greedy and drawn, beside a slot that asks for nothing."""
    logits_V = logits(1)[0]
    likeliest = int(logits_V.argmax())
    params = [
        SamplingParams(logit_bias={7: 100}),
        SamplingParams(),
        SamplingParams(logit_bias={likeliest: -100}),
        SamplingParams(temperature=1, seed=4, logit_bias={7: 100}),
    ]
    tokens = chosen(np.stack([logits_V] * 4), slots(*params), [4, 4, 4, 4])
    assert tokens == [7, likeliest, int(np.argsort(logits_V)[-2]), 7]


def test_bias_comes_before_penalties_and_cannot_bring_back_what_must_wait():
    logits_V = np.full(VOCABULARY, -5.0, np.float32)
    logits_V[[1, 2]] = [2.0, 1.0]
    said_BV = jnp.zeros((1, VOCABULARY), jnp.uint16).at[0, 2].set(1)
    # 1 + 8 = 9, over 3 is 3; the other way round 1 / 3 + 8 would win over 2 + 2.
    params = SamplingParams(logit_bias={2: 8, 1: 2}, repetition_penalty=3)
    assert sample(array(logits_V[None]), said_BV, slots(params), array([4])).tolist() == [1]
    params = SamplingParams(logit_bias={2: 100}, min_tokens=5, stop_token_ids=(2,))
    assert chosen(logits_V[None], slots(params), [4]) == [1]
    assert chosen(logits_V[None], slots(params), [5]) == [2]


def test_what_must_wait_is_never_drawn():
    logits_V = np.full(VOCABULARY, -20.0, np.float32)
    logits_V[[5, 6]] = [10.0, 0.0]
    params = SamplingParams(temperature=2, top_p=0.9, min_p=0.01, top_k=3, min_tokens=3, stop_token_ids=(5,), seed=1)
    tokens = chosen(np.stack([logits_V] * 2), slots(params, params), [2, 3])
    assert tokens == [6, 5]
